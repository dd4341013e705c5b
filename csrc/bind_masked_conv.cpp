// Addresses in, 0 for none; sizes as (n, channels, height, width, pad height, pad width, 1 where channels
// come last in memory) and (height, width, dilation height, dilation width).
#include <pybind11/stl.h>

#include <array>
#include <limits>
#include <stdexcept>

#include "bindings.h"
#include "common/cpu.h"
#include "common/scratch.h"
#include "cpu/masked_conv_layout.h"

namespace py = pybind11;

namespace autoflip {
namespace {

using Seven = std::array<int64_t, 7>;
using Four = std::array<int64_t, 4>;

const MaskedConv& kernels() { return pick(masked_conv_base, masked_conv_avx2, masked_conv_avx512); }

Images images_of(const Seven& s) { return {s[0], s[1], s[2], s[3], s[4], s[5], s[6] != 0}; }
Kernel kernel_of(const Four& s) { return {s[0], s[1], s[2], s[3]}; }

// a tile of the products is a piece of a row, the gradient's is a rectangle
int64_t tile_height(bool sample) { return sample ? kernels().sample_height : 1; }
int64_t tile_width(bool sample) { return sample ? kernels().sample_width : kernels().tile; }

py::bytes layout(uintptr_t mask, int64_t rows, const Seven& images, const Four& kernel, bool sample,
                 bool turned) {
  if (rows * images[1] * kernel[0] * kernel[1] > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("masked_conv: a mask of 2^31 entries or more has no layout");
  std::vector<uint8_t> bytes;
  {
    py::gil_scoped_release release;
    bytes = masked_conv_layout(kernels(), at<const uint8_t>(mask), rows, images_of(images), kernel_of(kernel),
                               tile_height(sample), tile_width(sample), turned);
  }
  return py::bytes(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

// One convolution's sizes: the panels of x and of dy, whose convolution with the turned kernel is dx.
struct Shape {
  Images x, dy;
  Kernel kernel;

  Shape(const Seven& x_sizes, const Seven& dy_sizes, const Four& kernel_sizes)
      : x(images_of(x_sizes)), dy(images_of(dy_sizes)), kernel(kernel_of(kernel_sizes)) {}

  Layout layout(uintptr_t lay, int64_t kept, int64_t rows, const Images& images, bool sample) const {
    return masked_conv_layout_at(kernels(), at<const uint8_t>(lay), kept, rows, images, kernel,
                                 tile_height(sample), tile_width(sample));
  }

  // y, images like `out`, = convolution of a panel with the weight at the layout
  void multiply(uintptr_t panel, const Images& images, const Images& out, uintptr_t lay, int64_t kept,
                uintptr_t weight, uintptr_t bias, uintptr_t y, int threads) const {
    const MaskedConv& k = kernels();
    const Layout found = layout(lay, kept, out.channels, images, false);
    // the values at the end: strips begin at a whole cache line
    const int64_t strips = threads * k.strip_size(images, kernel, found.block);
    float *maps = thread_scratch().take(strips + kept), *values = maps + strips;
    k.gather(at<const int32_t>(lay), kept, at<const float>(weight), values);
    k.multiply(found, values, at<const float>(panel), images, kernel, at<const float>(bias), at<float>(y),
               out.last, maps, threads);
  }

  void forward(uintptr_t in, uintptr_t panel, uintptr_t lay, int64_t kept, uintptr_t weight, uintptr_t bias,
               uintptr_t y, int threads) const {
    py::gil_scoped_release release;
    kernels().to_panel(at<const float>(in), x, at<float>(panel), nullptr, threads);
    multiply(panel, x, dy, lay, kept, weight, bias, y, threads);
    thread_scratch().settle();
  }

  void panels(uintptr_t x_in, uintptr_t x_panel, uintptr_t dy_in, uintptr_t dy_panel, uintptr_t db,
              int threads) const {
    const MaskedConv& k = kernels();
    if (x_in) k.to_panel(at<const float>(x_in), x, at<float>(x_panel), nullptr, threads);
    const int64_t groups = ceil_div(dy.n, k.lanes);
    float* sums = db ? thread_scratch().take(groups * dy.channels) : nullptr;
    if (dy_in) k.to_panel(at<const float>(dy_in), dy, at<float>(dy_panel), sums, threads);
    for (int64_t c = 0; db && c < dy.channels; ++c) {
      float sum = 0;
      for (int64_t g = 0; g < groups; ++g) sum += sums[g * dy.channels + c];
      at<float>(db)[c] = sum;
    }
  }

  void backward(uintptr_t x_in, uintptr_t x_panel, uintptr_t dy_in, uintptr_t dy_panel, uintptr_t dx_lay,
                uintptr_t dw_lay, int64_t kept, uintptr_t weight, uintptr_t dx, uintptr_t dw, uintptr_t db,
                int threads) const {
    py::gil_scoped_release release;
    panels(x_in, x_panel, dy_in, dy_panel, db, threads);
    if (dx) multiply(dy_panel, dy, x, dx_lay, kept, weight, 0, dx, threads);
    if (dw)
      kernels().gradient(layout(dw_lay, kept, dy.channels, x, true), at<const int32_t>(dw_lay), kept,
                         at<const float>(x_panel), x, at<const float>(dy_panel), dy, kernel, at<float>(dw),
                         thread_scratch().take(kept), threads);
    thread_scratch().settle();
  }
};

}  // namespace

void bind_masked_conv(py::module_& m) {
  m.def("masked_conv_layout", layout,
        "the layout of mask (rows, channels, kernel); empty where offsets do not fit");
  py::class_<Shape>(m, "MaskedConvShape")
      .def(py::init<const Seven&, const Seven&, const Four&>())
      .def_property_readonly("x_floats", [](const Shape& s) { return kernels().panel_size(s.x); })
      .def_property_readonly("dy_floats", [](const Shape& s) { return kernels().panel_size(s.dy); })
      .def("forward", &Shape::forward,
           "y = conv2d(x, weight at the layout) + bias, by way of x's panel, which is written")
      .def("backward", &Shape::backward,
           "dx, dw and db, unless null. x, dy null: their panels are there, else they are written; dw keeps "
           "its "
           "entries outside the layout");
}

}  // namespace autoflip
