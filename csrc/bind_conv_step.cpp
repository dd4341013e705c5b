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

void free_plan(PyObject* capsule) { delete static_cast<ConvPlan*>(PyCapsule_GetPointer(capsule, nullptr)); }

py::object make_plan(const ConvShape& shape, uintptr_t forward, uintptr_t dx, uintptr_t dw, int64_t kept,
                     py::object owner) {
  const auto size = [](const Images& i) { return py::make_tuple(i.n, i.channels, i.height, i.width); };
  const int64_t rows = shape.dy.channels, cols = shape.x.channels;
  auto* plan = new ConvPlan{shape,
                            forward,
                            dx,
                            dw,
                            kept,
                            rows * cols * shape.kernel.area(),
                            size(shape.dy),
                            size(shape.x),
                            py::make_tuple(rows, cols, shape.kernel.height, shape.kernel.width),
                            py::int_(rows),
                            owner};
  return owned(PyCapsule_New(plan, nullptr, free_plan));
}

// the functions that serve every other case, given once
PyObject *otherwise_forward, *otherwise_backward;

// A job is (parts, plan or None).
constexpr Py_ssize_t kPlan = 1;

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
                        PyObject* const* needs) {
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

// (ctx, x, weight, bias or None, job) -> y
PyObject* forward(PyObject*, PyObject* const* args, Py_ssize_t n) {
  const ConvPlan* plan = plan_of<ConvPlan>(args[4], kPlan);
  if (!plan || !contiguous(args[1]) || !contiguous(args[2]) || (args[3] != Py_None && !contiguous(args[3])))
    return PyObject_Vectorcall(otherwise_forward, args, size_t(n), nullptr);
  return guarded([&] { return forward_here(*plan, args[0], args[1], args[2], args[3], args[4]); });
}

// (ctx, dy) -> dx, dw, db, None
PyObject* backward(PyObject*, PyObject* const* args, Py_ssize_t n) {
  return guarded([&]() -> PyObject* {
    PyObject *ctx = args[0], *dy = args[1];
    const py::object job = get(ctx, names.job);
    const ConvPlan* plan = plan_of<ConvPlan>(job.ptr(), kPlan);
    if (plan && is(PyObject_CallNoArgs(torch.grad_enabled), Py_False) && quiet() && ordinary(dy) &&
        contiguous(dy)) {
      const py::object needs = get(ctx, names.needs), saved = get(ctx, names.saved);
      PyObject *x = PyTuple_GET_ITEM(saved.ptr(), 0), *weight = PyTuple_GET_ITEM(saved.ptr(), 1);
      PyObject* const* need = &PyTuple_GET_ITEM(needs.ptr(), 0);
      // what hooks on saved tensors bring back may lie otherwise
      if ((need[0] == Py_True || need[1] == Py_True) && contiguous(x) && contiguous(weight))
        return backward_here(*plan, ctx, dy, x, weight, need);
    }
    return PyObject_Vectorcall(otherwise_backward, args, size_t(n), nullptr);
  });
}

PyMethodDef forward_def = {"masked_conv_step_forward",
                           reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(forward)),
                           METH_FASTCALL, nullptr};
PyMethodDef backward_def = {"masked_conv_step_backward",
                            reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(backward)),
                            METH_FASTCALL, nullptr};

py::tuple steps(py::object forward, py::object backward) {
  otherwise_forward = forward.release().ptr();
  otherwise_backward = backward.release().ptr();
  return py::make_tuple(owned(PyCFunction_New(&forward_def, nullptr)),
                        owned(PyCFunction_New(&backward_def, nullptr)));
}

}  // namespace

void bind_conv_step(py::module_& m) {
  m.def("masked_conv_plan", make_plan,
        "what masked_conv_steps' functions need of a mask: the sizes, the layouts of forward, dx and dw, how "
        "many "
        "weights are kept, what keeps the layouts alive");
  m.def("masked_conv_steps", steps,
        "forward(ctx, x, weight, bias, job) and backward(ctx, dy) of an autograd function, for jobs with a "
        "plan "
        "and contiguous tensors; takes what to call in all other cases");
}

}  // namespace autoflip
