// autoflip._C: addresses, sizes and thread counts in, nothing of torch. Python checks every dtype, shape,
// device and contiguity before it calls (autoflip/ops); nothing is checked twice here.
#include "bindings.h"

#include "common/cpu.h"

namespace {

// Asking numpy, a bytes or a memoryview through ctypes takes a microsecond, ten times as long.
uintptr_t address(pybind11::handle buffer) {
  Py_buffer view;
  if (PyObject_GetBuffer(buffer.ptr(), &view, PyBUF_SIMPLE)) throw pybind11::error_already_set();
  const auto found = reinterpret_cast<uintptr_t>(view.buf);
  PyBuffer_Release(&view);
  return found;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "autoflip's CPU kernels; use autoflip.ops, which checks what these functions take on trust";
  m.def(
      "isa", [] { return autoflip::isa_name(autoflip::cpu_isa()); },
      "instruction set that serves this process");
  m.def("multiplies_tiles", autoflip::multiplies_tiles, "whether it has AMX's, and may use them");
  m.def("address", address, "where the bytes of a contiguous buffer lie");
  autoflip::bind_masked_matmul(m);
  autoflip::bind_hook(m);
  autoflip::bind_step(m);
  autoflip::bind_masked_conv(m);
  autoflip::bind_codes(m);
  autoflip::bind_delta(m);
  autoflip::bind_hessian(m);
  autoflip::bind_recurrent(m);
}
