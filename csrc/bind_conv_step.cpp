// A masked convolution's training step as autograd calls it, one function forward and one back: written in
// Python it takes 0.3 ms longer after other code has been run, as in any model (Zen 4): a fifth of a step at
// density 0.1.
#include <cstring>

#include "masked_conv_calls.h"
#include "step_objects.h"

namespace py = pybind11;

namespace autoflip {
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
      py::make_tuple(rows, cols, shape.kernel.height, shape.kernel.width), py::int_(rows), owner});
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

void bind_conv_step(py::module_& m) {
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
