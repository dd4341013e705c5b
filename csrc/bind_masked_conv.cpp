// Addresses in, 0 for none; images as Images has them, a kernel as (height, width, dilation of both, padding
// of both, stride).
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <limits>
#include <new>
#include <stdexcept>
#include <utility>
#include <vector>

#include "bindings.h"
#include "common/cpu.h"
#include "common/scratch.h"
#include "masked_conv_calls.h"
#include "step_objects.h"

namespace py = pybind11;

namespace autoflip {
namespace {

using Ten = std::array<int64_t, 10>;
using Seven = std::array<int64_t, 7>;

const MaskedConv& kernels() { return AUTOFLIP_PICK(masked_conv); }

Images images_of(const Ten& s) { return {s[0], s[1], s[2], s[3], s[4], s[5], s[6] != 0, s[7], s[8], s[9]}; }
Kernel kernel_of(const Seven& s) { return {{s[0], s[2], s[4], s[6]}, {s[1], s[3], s[5], s[6]}}; }

// a tile of the products is a piece of a row, the gradient's is a rectangle
int64_t tile_height(bool sample) { return sample ? kernels().sample_height : 1; }
int64_t tile_width(bool sample, int64_t kept, int64_t entries) {
  return sample ? kernels().sample_width : tile_of(kernels(), kept, entries);
}

// of x, of dy, or for the gradient in x with `turned`: the other way round
py::bytes layout(uintptr_t mask, const ConvShape& s, bool sample, bool turned) {
  const Images &images = turned ? s.dy : s.x, &out = turned ? s.x : s.dy;
  const int64_t entries = out.channels * images.channels * s.kernel.area();
  if (entries > std::numeric_limits<int32_t>::max() / out.phases())
    throw std::invalid_argument("masked_conv: a mask of 2^31 entries or more has no layout");
  std::vector<uint8_t> bytes;
  {
    py::gil_scoped_release release;
    const uint8_t* from = at<const uint8_t>(mask);
    const int64_t kept = std::count(from, from + entries, uint8_t(1));
    bytes = masked_conv_layout(kernels(), from, images, out, s.kernel, tile_height(sample),
                               tile_width(sample, kept, entries), turned);
  }
  return py::bytes(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

Layout layout_at(const ConvShape& s, uintptr_t lay, int64_t kept, const Images& images, const Images& out,
                 bool sample) {
  return masked_conv_layout_at(kernels(), at<const uint8_t>(lay), kept, images, out, s.kernel,
                               tile_height(sample),
                               tile_width(sample, kept, out.channels * images.channels * s.kernel.area()));
}

// y, images like `out`, = convolution of a panel with the weight at the layout
void multiply(const ConvShape& s, uintptr_t panel, const Images& images, const Images& out, uintptr_t lay,
              int64_t kept, uintptr_t weight, uintptr_t bias, uintptr_t y, int threads) {
  const MaskedConv& k = kernels();
  const Layout found = layout_at(s, lay, kept, images, out, false);
  // the values at the end: strips begin at a whole cache line
  const int64_t strips = threads * k.strip_size(images, s.kernel, found.block);
  float *maps = thread_scratch().take(strips + kept), *values = maps + strips;
  k.gather(at<const int32_t>(lay), kept, at<const float>(weight), values);
  const int64_t tile = tile_width(false, kept, out.channels * images.channels * s.kernel.area());
  k.multiply(found, tile, values, at<const float>(panel), images, s.kernel, at<const float>(bias),
             at<float>(y), out, maps, threads);
}

void panels(const ConvShape& s, uintptr_t x_in, uintptr_t x_panel, uintptr_t dy_in, uintptr_t dy_panel,
            uintptr_t db, int threads) {
  const MaskedConv& k = kernels();
  if (x_in) k.to_panel(at<const float>(x_in), s.x, at<float>(x_panel), nullptr, threads);
  const int64_t groups = ceil_div(s.dy.n, k.lanes);
  float* sums = db ? thread_scratch().take(groups * s.dy.channels) : nullptr;
  if (dy_in) k.to_panel(at<const float>(dy_in), s.dy, at<float>(dy_panel), sums, threads);
  for (int64_t c = 0; db && c < s.dy.channels; ++c) {
    float sum = 0;
    for (int64_t g = 0; g < groups; ++g) sum += sums[g * s.dy.channels + c];
    at<float>(db)[c] = sum;
  }
}

// panels that are out of use, and how many floats they are
struct {
  std::vector<std::pair<int64_t, float*>> free;
  int64_t floats = 0;
} pool;

}  // namespace

ConvPanel::ConvPanel(int64_t floats) : floats_(floats) {
  for (auto found = pool.free.rbegin(); found != pool.free.rend(); ++found)
    if (found->first == floats) {
      data_ = found->second;
      pool.free.erase(std::next(found).base());
      pool.floats -= floats;
      return;
    }
  data_ = static_cast<float*>(std::aligned_alloc(64, size_t((floats + 15) / 16 * 64)));
  if (!data_) throw std::bad_alloc();
}

ConvPanel::~ConvPanel() {
  constexpr int64_t kMost = int64_t(1) << 24;  // floats that are kept: 64 MB
  if (pool.floats + floats_ > kMost) {
    for (auto& panel : pool.free) std::free(panel.second);
    pool.free.clear();
    pool.floats = 0;
  }
  if (floats_ > kMost) {
    std::free(data_);
    return;
  }
  pool.free.emplace_back(floats_, data_);
  pool.floats += floats_;
}

int64_t ConvShape::x_floats() const { return kernels().panel_size(x); }
int64_t ConvShape::dy_floats() const { return kernels().panel_size(dy); }

void ConvShape::forward(uintptr_t in, uintptr_t panel, uintptr_t lay, int64_t kept, uintptr_t weight,
                        uintptr_t bias, uintptr_t y, int threads) const {
  py::gil_scoped_release release;
  kernels().to_panel(at<const float>(in), x, at<float>(panel), nullptr, threads);
  multiply(*this, panel, x, dy, lay, kept, weight, bias, y, threads);
  thread_scratch().settle();
}

void ConvShape::backward(uintptr_t x_in, uintptr_t x_panel, uintptr_t dy_in, uintptr_t dy_panel,
                         uintptr_t dx_lay, uintptr_t dw_lay, int64_t kept, uintptr_t weight, uintptr_t dx,
                         uintptr_t dw, uintptr_t db, int threads) const {
  py::gil_scoped_release release;
  panels(*this, x_in, x_panel, dy_in, dy_panel, db, threads);
  if (dx) multiply(*this, dy_panel, dy, x, dx_lay, kept, weight, 0, dx, threads);
  if (dw)
    kernels().gradient(layout_at(*this, dw_lay, kept, x, dy, true), at<const int32_t>(dw_lay), kept,
                       at<const float>(x_panel), x, at<const float>(dy_panel), dy, kernel, at<float>(dw),
                       thread_scratch().take(kept), threads);
  thread_scratch().settle();
}

// The training step as autograd calls it, one function forward and one back: written in Python it takes 0.3
// ms longer after other code has been run, as in any model (Zen 4): a fifth of a step at density 0.1.

namespace {

// What the steps of one mask and shape of x share, whose products are all sparse and whose tensors lie row by
// row.
struct ConvPlan {
  ConvShape shape;
  uintptr_t forward, dx, dw;  // layouts
  int64_t kept, entries;      // of the weight
  py::tuple y_size, x_size, w_size;
  py::object channels, owner;  // owner: keeps the layouts alive
};

py::object make_plan(const ConvShape& shape, uintptr_t forward, uintptr_t dx, uintptr_t dw, int64_t kept,
                     py::object owner) {
  const auto size = [](const Images& i) { return py::make_tuple(i.n, i.channels, i.height, i.width); };
  const int64_t rows = shape.dy.channels, cols = shape.x.channels;
  return capsule(new ConvPlan{
      shape, forward, dx, dw, kept, rows * cols * shape.kernel.area(), size(shape.dy), size(shape.x),
      py::make_tuple(rows, cols, shape.kernel.down.taps, shape.kernel.across.taps), py::int_(rows), owner});
}

uintptr_t data(const ConvPanel& panel) { return reinterpret_cast<uintptr_t>(panel.data()); }

PyObject* forward_here(const ConvPlan& p, PyObject* ctx, PyObject* x, PyObject* weight, PyObject* bias,
                       PyObject* job) {
  py::object y = empty_like(x, p.y_size.ptr());
  py::object panel = py::cast(new ConvPanel(p.shape.x_floats()), py::return_value_policy::take_ownership);
  p.shape.forward(place(x), data(panel.cast<ConvPanel&>()), p.forward, p.kept, place(weight), place(bias),
                  place(y.ptr()), threads());
  save(ctx, x, weight, Py_None);
  set(ctx, names.job, job);
  const py::object needs = get(ctx, names.needs);
  set(ctx, names.panel, PyTuple_GET_ITEM(needs.ptr(), 1) == Py_True ? panel.ptr() : Py_None);
  return y.release().ptr();
}

PyObject* backward_here(const ConvPlan& p, PyObject* ctx, PyObject* dy, PyObject* x, PyObject* weight,
                        PyObject* const* needs, PyObject*) {
  py::object dx = py::none(), dw = py::none(), db = py::none(), panel = py::none();
  uintptr_t x_in = 0, x_panel = 0;
  if (needs[0] == Py_True) dx = empty_like(dy, p.x_size.ptr());
  if (needs[2] == Py_True) db = empty_like(dy, p.channels.ptr());
  if (needs[1] == Py_True) {
    dw = empty_like(dy, p.w_size.ptr());
    std::memset(at<float>(place(dw.ptr())), 0, size_t(p.entries) * sizeof(float));
    panel = get(ctx, names.panel);
    set(ctx, names.panel, Py_None);  // a second backward pass makes its own
    if (panel.is_none()) {
      panel = py::cast(new ConvPanel(p.shape.x_floats()), py::return_value_policy::take_ownership);
      x_in = place(x);
    }
    x_panel = data(panel.cast<ConvPanel&>());
  }
  const ConvPanel dy_panel(p.shape.dy_floats());
  p.shape.backward(x_in, x_panel, place(dy), data(dy_panel), p.dx, p.dw, p.kept, place(weight),
                   place(dx.ptr()), place(dw.ptr()), place(db.ptr()), threads());
  return PyTuple_Pack(4, dx.ptr(), dw.ptr(), db.ptr(), Py_None);
}

// A job is (parts, plan or None).
struct Here {
  using Plan = ConvPlan;
  static constexpr Py_ssize_t kPlan = 1;
  static constexpr const char *kForward = "masked_conv_step_forward",
                              *kBackward = "masked_conv_step_backward";
  static constexpr auto forward = forward_here;
  static constexpr auto backward = backward_here;
};

}  // namespace

void bind_masked_conv(py::module_& m) {
  py::class_<ConvPanel>(m, "MaskedConvPanel")
      .def(py::init<int64_t>())
      .def("clear", [](ConvPanel& p) { std::memset(p.data(), 0, size_t(p.floats()) * sizeof(float)); })
      .def("data_ptr", [](const ConvPanel& p) { return reinterpret_cast<uintptr_t>(p.data()); });
  py::class_<ConvShape>(m, "MaskedConvShape")
      .def(py::init([](const Ten& x, const Ten& dy, const Seven& kernel) {
        return ConvShape{images_of(x), images_of(dy), kernel_of(kernel)};
      }))
      .def_property_readonly("x_floats", &ConvShape::x_floats)
      .def_property_readonly("dy_floats", &ConvShape::dy_floats)
      .def("forward", &ConvShape::forward,
           "y = conv2d(x, weight at the layout) + bias, by way of x's panel, which is written")
      .def("backward", &ConvShape::backward,
           "dx, dw and db, unless null. x, dy null: their panels are there, else they are written; dw keeps "
           "its entries outside the layout");
  m.def("masked_conv_layout", layout,
        "the layout of a mask for a shape; `sample`: for the gradient in the weight, `turned`: in x; empty "
        "where it does not fit");
  m.def("masked_conv_plan", make_plan,
        "what masked_conv_steps' functions need of a mask: the sizes, the layouts of forward, dx and dw, how "
        "many "
        "weights are kept, what keeps the layouts alive");
  m.def("masked_conv_steps", Step<Here>::make,
        "forward(ctx, x, weight, bias, job) and backward(ctx, dy) of an autograd function, for jobs with a "
        "plan "
        "and contiguous tensors; takes what to call in all other cases");
}

}  // namespace autoflip
