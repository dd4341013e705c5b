// torch's tensors, asked through their Python methods: a question costs a third of what it costs in Python.
// Nothing of torch is linked.
#pragma once
#include "bindings.h"

namespace autoflip {

// torch's objects, given once by autoflip.ops._masked_weight; they live as long as the process.
struct Torch {
  PyObject *tensor, *parameter;                      // types
  PyObject *float32, *float64, *float16, *bfloat16;  // dtypes
  PyObject *modes, *tracing, *transforms, *batched;  // what of torch is at work on tensors
  PyObject *forward_ad, *strided;  // the dict of torch.autograd.forward_ad; the usual layout
  PyObject *grad_enabled, *autocast, *threads;
};
struct Names {
  PyObject *dtype, *is_cpu, *is_contiguous, *numel, *data_ptr, *use_count, *base, *version, *shape, *cpu,
      *level, *layout, *is_neg;
  PyObject *new_empty, *save, *saved, *needs, *job, *operand, *values, *panel;
};
extern Torch torch;
extern Names names;

bool masked_matmul_wanted();

inline PyObject* method(PyObject* object, PyObject* name) {
  return PyObject_VectorcallMethod(name, &object, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
}

// Whether an answer is `wanted`; takes the answer. No answer (an exception) is none.
inline bool is(PyObject* answer, PyObject* wanted) {
  if (!answer) PyErr_Clear();
  Py_XDECREF(answer);
  return answer == wanted;
}

inline long number(PyObject* answer) {
  const long value = answer ? PyLong_AsLong(answer) : -1;
  Py_XDECREF(answer);
  if (PyErr_Occurred()) PyErr_Clear();
  return value;
}

inline void* address(PyObject* answer) {
  void* value = answer ? PyLong_AsVoidPtr(answer) : nullptr;
  Py_XDECREF(answer);
  if (PyErr_Occurred()) PyErr_Clear();
  return value;
}

inline bool contiguous(PyObject* t) { return is(method(t, names.is_contiguous), Py_True); }

// Whether tensors may carry tangents: forward-mode derivatives outside any function transform.
inline bool forward_mode() {
  PyObject* level = PyDict_GetItem(torch.forward_ad, names.level);
  return level && PyLong_AsLong(level) >= 0;
}

// No dispatch mode, trace, function transform or forward-mode derivative, and AUTOFLIP_BACKEND leaves tensors
// to this extension.
inline bool quiet() {
  return number(PyObject_CallNoArgs(torch.modes)) == 0 && is(PyObject_CallNoArgs(torch.tracing), Py_False) &&
         is(PyObject_CallNoArgs(torch.transforms), Py_None) && !forward_mode() && masked_matmul_wanted();
}

// Bytes of an entry of a floating tensor; 0 of any other.
inline int entry_bytes(PyObject* t) {
  PyObject* dtype = PyObject_GetAttr(t, names.dtype);
  if (!dtype) PyErr_Clear();
  Py_XDECREF(dtype);  // torch's dtypes live as long as the process
  if (dtype == torch.float32) return 4;
  if (dtype == torch.bfloat16 || dtype == torch.float16) return 2;
  return dtype == torch.float64 ? 8 : 0;
}

// An ordinary floating tensor with an address in the CPU's memory, which holds its values as they are.
inline bool in_memory(PyObject* t) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(t));
  return (type == torch.tensor || type == torch.parameter) && entry_bytes(t) &&
         is(PyObject_GetAttr(t, names.is_cpu), Py_True) &&
         (type == torch.parameter ||
          (is(PyObject_GetAttr(t, names.layout), torch.strided) && is(method(t, names.is_neg), Py_False))) &&
         is(PyObject_CallOneArg(torch.batched, t), Py_False);
}

// And float32.
inline bool ordinary(PyObject* t) {
  return is(PyObject_GetAttr(t, names.dtype), torch.float32) && in_memory(t);
}

}  // namespace autoflip
