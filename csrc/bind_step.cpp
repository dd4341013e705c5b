// A masked linear layer's training step as autograd calls it, one function forward and one back. Written in
// Python a step of a small layer takes a seventh longer, more where other layers' code has been run in
// between.
#include "masked_calls.h"
#include "step_objects.h"

namespace py = pybind11;

namespace autoflip {
namespace {

// What the steps of one mask share. Each of forward, dx and dw walks what is kept or computes every product.
struct Plan {
  uintptr_t layout;
  int64_t chunk, rows, cols, values;  // values: floats of the copy of the kept weights, 0: none
  int height;                         // rows of a block; 0: the mask has none
  uintptr_t bits;                     // of the mask, where a product is computed whole; else 0
  bool every[3];
  py::object owner;  // keeps layout and bits alive
};

py::object make_plan(uintptr_t layout, int64_t chunk, int64_t rows, int64_t cols, int64_t values, int height,
                     uintptr_t bits, int every, py::object owner) {
  return capsule(new Plan{layout,
                          chunk,
                          rows,
                          cols,
                          values,
                          height,
                          bits,
                          {bool(every & 1), bool(every & 2), bool(every & 4)},
                          owner});
}

// A job is (relu, parts, what makes the weight's gradient or None, plan or None).
constexpr Py_ssize_t kGradient = 2, kPlan = 3;

// a new tensor like `t`, of one or (cols > 0) two dimensions
py::object empty(PyObject* t, int64_t rows, int64_t cols) {
  const py::object first = owned(PyLong_FromLongLong(rows)), second = owned(PyLong_FromLongLong(cols));
  PyObject* args[] = {t, first.ptr(), second.ptr()};
  return owned(PyObject_VectorcallMethod(names.new_empty, args,
                                         (cols < 0 ? 2 : 3) | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
}

int64_t rows_of(PyObject* t) {
  const py::object shape = get(t, names.shape);
  return PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), 0));
}

PyObject* forward_here(const Plan& p, PyObject* ctx, PyObject* x, PyObject* weight, PyObject* bias,
                       PyObject* job) {
  const int64_t n = rows_of(x);
  const py::object y = empty(x, n, p.rows);
  py::object values = py::none();
  if (p.values) {
    const py::object needs = get(ctx, names.needs);
    if (PyTuple_GET_ITEM(needs.ptr(), 0) == Py_True) values = empty(x, p.values, -1);
  }
  const uintptr_t from = place(x), w = place(weight), b = place(bias), to = place(y.ptr());
  if (p.every[0])
    masked_every_forward(w, p.bits, from, n, p.rows, p.cols, b, false, to, threads());
  else if (p.height)
    masked_blocks_forward(from, w, p.layout, p.chunk, p.height, b, n, p.rows, p.cols, false, to,
                          place(values.ptr()), threads());
  else
    masked_matmul_forward(from, w, p.layout, p.chunk, b, n, p.rows, p.cols, false, to, place(values.ptr()),
                          threads());
  save(ctx, x, weight, Py_None);
  set(ctx, names.job, job);
  set(ctx, names.operand, Py_None);
  set(ctx, names.values, values.ptr());
  return py::object(y).release().ptr();
}

PyObject* backward_here(const Plan& p, PyObject* ctx, PyObject* dy, PyObject* x, PyObject* weight,
                        PyObject* const* needs, PyObject* job) {
  const int64_t n = rows_of(dy);
  PyObject* gradient = PyTuple_GET_ITEM(job, kGradient);
  py::object dx = py::none(), dw = py::none(), db = py::none();
  if (needs[0] == Py_True) dx = empty(dy, n, p.cols);
  if (needs[1] == Py_True)
    dw = gradient == Py_None ? empty(dy, p.rows, p.cols) : owned(PyObject_CallNoArgs(gradient));
  if (needs[2] == Py_True) db = empty(dy, p.rows, -1);
  const py::object values = get(ctx, names.values);
  const uintptr_t from = place(dy), in = dw.is_none() ? 0 : place(x), w = dx.is_none() ? 0 : place(weight),
                  v = place(values.ptr()), to = place(dx.ptr()), to_w = place(dw.ptr()),
                  to_b = place(db.ptr());
  if (p.every[0] && p.every[1] && p.every[2]) {
    masked_every_backward(w, p.bits, from, in, n, p.rows, p.cols, to, to_w, to_b, threads());
  } else if (p.height) {
    masked_blocks_backward(from, in, w, v, p.layout, p.chunk, p.height, n, p.rows, p.cols, to, to_w, to_b,
                           threads());
  } else {
    masked_matmul_backward(from, in, w, v, p.layout, p.chunk, n, p.rows, p.cols, p.every[1] ? 0 : to,
                           p.every[2] ? 0 : to_w, to_b, threads());
    if (p.every[1] && to) masked_every_backward(w, p.bits, from, 0, n, p.rows, p.cols, to, 0, 0, threads());
    if (p.every[2] && to_w) masked_matmul_outer(from, in, 0, p.bits, n, p.rows, p.cols, to_w, threads());
  }
  return PyTuple_Pack(4, dx.ptr(), dw.ptr(), db.ptr(), Py_None);
}

struct Here {
  using Plan = autoflip::Plan;
  static constexpr Py_ssize_t kPlan = autoflip::kPlan;
  static constexpr const char *kForward = "masked_step_forward", *kBackward = "masked_step_backward";
  static constexpr auto forward = forward_here;
  static constexpr auto backward = backward_here;
};

}  // namespace

void bind_step(py::module_& m) {
  m.def(
      "masked_plan", make_plan,
      "what masked_steps' functions need of a mask: its layout, chunk, rows, columns, floats of the copy of "
      "its kept weights (or 0), rows of its blocks (or 0), masked_few_bits (or 0), which of forward, dx and "
      "dw "
      "compute every product by them, what keeps both alive");
  m.def("masked_steps", Step<Here>::make,
        "forward(ctx, x, weight, bias, job) and backward(ctx, dy) of an autograd function, for jobs with a "
        "plan "
        "and contiguous tensors; takes what to call in all other cases");
}

}  // namespace autoflip
