// What bind_step.cpp and bind_masked_conv.cpp share: a training step as autograd calls it, and what it asks
// of Python.
#pragma once
#include "torch_objects.h"

namespace autoflip {

inline pybind11::object owned(PyObject* result) {
  if (!result) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(result);
}

inline void set(PyObject* object, PyObject* name, PyObject* value) {
  if (PyObject_SetAttr(object, name, value)) throw pybind11::error_already_set();
}

inline pybind11::object get(PyObject* object, PyObject* name) {
  return owned(PyObject_GetAttr(object, name));
}

// where a tensor's entries are; 0: of None
inline uintptr_t place(PyObject* t) {
  return t == Py_None ? 0 : reinterpret_cast<uintptr_t>(address(method(t, names.data_ptr)));
}

inline int threads() { return int(number(PyObject_CallNoArgs(torch.threads))); }

// a new tensor like `t` of the sizes that a tuple or an int names
inline pybind11::object empty_like(PyObject* t, PyObject* size) {
  PyObject* args[] = {t, size};
  return owned(PyObject_VectorcallMethod(names.new_empty, args, 2 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
}

inline void save(PyObject* ctx, PyObject* a, PyObject* b, PyObject* c) {
  PyObject* args[] = {ctx, a, b, c};
  owned(PyObject_VectorcallMethod(names.save, args, 4 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
}

// Own `plan`, which is to travel as a job's entry.
template <class Plan>
pybind11::object capsule(Plan* plan) {
  const auto drop = [](PyObject* it) { delete static_cast<Plan*>(PyCapsule_GetPointer(it, nullptr)); };
  return owned(PyCapsule_New(plan, nullptr, drop));
}

template <class Step>
PyObject* guarded(Step&& step) {
  try {
    return step();
  } catch (pybind11::error_already_set& error) {
    error.restore();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// The two functions that autograd calls for a kind of step. `Here` names them and has
//   Plan                                             what a job's entry kPlan, a capsule or None, holds
//   forward(plan, ctx, x, weight, bias, job)         -> y
//   backward(plan, ctx, dy, x, weight, needs, job)   -> (dx, dw, db, None)
// for jobs with a plan and contiguous tensors; all other cases go to what `make` was given.
template <class Here>
struct Step {
  using Plan = typename Here::Plan;

  // (forward, backward) of an autograd function: (ctx, x, weight, bias or None, job) -> y and
  // (ctx, dy) -> dx, dw, db, None
  static pybind11::tuple make(pybind11::object forward_otherwise, pybind11::object backward_otherwise) {
    forward_otherwise_ = forward_otherwise.release().ptr();
    backward_otherwise_ = backward_otherwise.release().ptr();
    return pybind11::make_tuple(owned(PyCFunction_New(&forward_def_, nullptr)),
                                owned(PyCFunction_New(&backward_def_, nullptr)));
  }

 private:
  static const Plan* plan_of(PyObject* job) {
    PyObject* held = PyTuple_GET_ITEM(job, Here::kPlan);
    return held == Py_None ? nullptr : static_cast<Plan*>(PyCapsule_GetPointer(held, nullptr));
  }

  static PyObject* forward(PyObject*, PyObject* const* args, Py_ssize_t n) {
    const Plan* plan = plan_of(args[4]);
    if (!plan || !contiguous(args[1]) || !contiguous(args[2]) || (args[3] != Py_None && !contiguous(args[3])))
      return PyObject_Vectorcall(forward_otherwise_, args, size_t(n), nullptr);
    return guarded([&] { return Here::forward(*plan, args[0], args[1], args[2], args[3], args[4]); });
  }

  static PyObject* backward(PyObject*, PyObject* const* args, Py_ssize_t n) {
    return guarded([&]() -> PyObject* {
      PyObject *ctx = args[0], *dy = args[1];
      const pybind11::object job = get(ctx, names.job);
      const Plan* plan = plan_of(job.ptr());
      if (plan && is(PyObject_CallNoArgs(torch.grad_enabled), Py_False) && quiet() && ordinary(dy) &&
          contiguous(dy)) {
        const pybind11::object needs = get(ctx, names.needs), saved = get(ctx, names.saved);
        PyObject *x = PyTuple_GET_ITEM(saved.ptr(), 0), *weight = PyTuple_GET_ITEM(saved.ptr(), 1);
        PyObject* const* need = &PyTuple_GET_ITEM(needs.ptr(), 0);
        // what hooks on saved tensors bring back may lie otherwise
        if ((need[0] == Py_True || need[1] == Py_True) && contiguous(x) && contiguous(weight))
          return Here::backward(*plan, ctx, dy, x, weight, need, job.ptr());
      }
      return PyObject_Vectorcall(backward_otherwise_, args, size_t(n), nullptr);
    });
  }

  static PyCFunction called(PyObject* (*f)(PyObject*, PyObject* const*, Py_ssize_t)) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f));
  }

  // the functions that serve every other case, given once
  static inline PyObject *forward_otherwise_ = nullptr, *backward_otherwise_ = nullptr;
  static inline PyMethodDef forward_def_ = {Here::kForward, called(forward), METH_FASTCALL, nullptr};
  static inline PyMethodDef backward_def_ = {Here::kBackward, called(backward), METH_FASTCALL, nullptr};
};

}  // namespace autoflip
