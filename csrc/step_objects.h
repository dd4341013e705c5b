// What the training steps of bind_step.cpp and bind_conv_step.cpp ask of Python.
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

// What a job, a tuple, has as its entry `i`, a capsule; null where it is None.
template <class Plan>
const Plan* plan_of(PyObject* job, Py_ssize_t i) {
  PyObject* capsule = PyTuple_GET_ITEM(job, i);
  return capsule == Py_None ? nullptr : static_cast<Plan*>(PyCapsule_GetPointer(capsule, nullptr));
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

}  // namespace autoflip
