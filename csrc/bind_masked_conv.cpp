// Addresses in; sizes as (n, channels, height, width, pad height, pad width) and (height, width, dilation
// height, dilation width).
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

using Six = std::array<int64_t, 6>;
using Four = std::array<int64_t, 4>;

const MaskedConv& kernels() { return pick(masked_conv_base, masked_conv_avx2, masked_conv_avx512); }

Images images_of(const Six& s) { return {s[0], s[1], s[2], s[3], s[4], s[5]}; }
Kernel kernel_of(const Four& s) { return {s[0], s[1], s[2], s[3]}; }

// a tile of the products is a piece of a row, the gradient's is a square
int64_t tile_height(bool sample) { return sample ? kernels().sample : 1; }
int64_t tile_width(bool sample) { return sample ? kernels().sample : kernels().tile; }

py::bytes layout(uintptr_t mask, int64_t rows, const Six& images, const Four& kernel, bool sample,
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

int64_t panel_size(const Six& images) { return kernels().panel_size(images_of(images)); }

void panel(uintptr_t x, const Six& images, uintptr_t out, int threads) {
  py::gil_scoped_release release;
  kernels().to_panel(at<const float>(x), images_of(images), at<float>(out), threads);
}

void multiply(uintptr_t panel, const Six& sizes, const Four& kernel_sizes, uintptr_t lay, int64_t kept,
              int64_t rows, uintptr_t weight, uintptr_t bias, uintptr_t y, int threads) {
  py::gil_scoped_release release;
  const MaskedConv& k = kernels();
  const Images images = images_of(sizes);
  const Kernel kernel = kernel_of(kernel_sizes);
  const Layout layout = masked_conv_layout_at(k, at<const uint8_t>(lay), kept, rows, images, kernel,
                                              tile_height(false), tile_width(false));
  Scratch& scratch = thread_scratch();
  // the values at the end: strips begin at a whole cache line
  const int64_t strips = threads * k.strip_size(images, kernel, layout.block);
  float *maps = scratch.take(strips + kept), *values = maps + strips;
  k.gather(at<const int32_t>(lay), kept, at<const float>(weight), values);
  k.multiply(layout, values, at<const float>(panel), images, kernel, at<const float>(bias), at<float>(y),
             maps, threads);
  scratch.settle();
}

void gradient(uintptr_t x, const Six& x_images, uintptr_t dy, const Six& dy_images, const Four& kernel_sizes,
              uintptr_t lay, int64_t kept, uintptr_t dw, int threads) {
  py::gil_scoped_release release;
  const MaskedConv& k = kernels();
  const Images images = images_of(x_images);
  const Kernel kernel = kernel_of(kernel_sizes);
  const Layout layout = masked_conv_layout_at(k, at<const uint8_t>(lay), kept, dy_images[1], images, kernel,
                                              tile_height(true), tile_width(true));
  Scratch& scratch = thread_scratch();
  k.gradient(layout, at<const int32_t>(lay), kept, at<const float>(x), images, at<const float>(dy),
             images_of(dy_images), kernel, at<float>(dw), scratch.take(kept), threads);
  scratch.settle();
}

}  // namespace

void bind_masked_conv(py::module_& m) {
  m.def("masked_conv_layout", layout,
        "the layout of mask (rows, channels, kernel); empty where offsets do not fit");
  m.def("masked_conv_panel_size", panel_size, "floats of a panel");
  m.def("masked_conv_panel", panel, "out = x (n, channels, height, width) as a panel");
  m.def("masked_conv_multiply", multiply,
        "y (n, rows, height, width) = conv2d(panel, weight at the layout) + bias");
  m.def("masked_conv_gradient", gradient,
        "dw = the gradient of the weight at the layout, panels of x and dy in; other entries of dw stay");
}

}  // namespace autoflip
