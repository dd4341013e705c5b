// One bind function per kernel family, each in its own bind_<family>.cpp: pybind11 alone takes ten seconds a
// file.
#pragma once
#include <pybind11/pybind11.h>

namespace autoflip {

void bind_masked_matmul(pybind11::module_& m);
void bind_hook(pybind11::module_& m);
void bind_step(pybind11::module_& m);
void bind_masked_conv(pybind11::module_& m);
void bind_codes(pybind11::module_& m);
void bind_delta(pybind11::module_& m);
void bind_hessian(pybind11::module_& m);
void bind_recurrent(pybind11::module_& m);

// An address that Python took from tensor.data_ptr().
template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace autoflip
