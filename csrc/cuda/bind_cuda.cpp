// autoflip._cuda: addresses, sizes and a stream in. Every launcher returns cudaGetLastError(); check() raises
// it. A family declares its launchers here, right before its bind function, and adds one line to
// PYBIND11_MODULE.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace py = pybind11;

// --- device.cu

extern "C" {
int device_count_cuda();
const char* error_string_cuda(int error);
}

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check(const char* what, int error) {
  if (error) throw std::runtime_error(std::string(what) + ": " + error_string_cuda(error));
}

}  // namespace

// --- masked_matmul

extern "C" {
int masked_matmul_fwd_cuda(const float* x, const float* w, const uint8_t* mask, const uint8_t* live,
                           const float* bias, int64_t n, int64_t o, int64_t k, int relu, float* y,
                           void* stream);
int masked_matmul_dx_cuda(const float* dy, const float* w, const uint8_t* mask, const uint8_t* live,
                          int64_t n, int64_t o, int64_t k, float* dx, void* stream);
int masked_matmul_dw_cuda(const float* dy, const float* x, const uint8_t* mask, const uint8_t* live,
                          int64_t n, int64_t o, int64_t k, float* dw, void* stream);
}

static void bind_masked_matmul(py::module_& m) {
  m.def("masked_matmul_forward",
        [](uintptr_t x, uintptr_t w, uintptr_t mask, uintptr_t live, uintptr_t bias, int64_t n, int64_t o,
           int64_t k, bool relu, uintptr_t y, uintptr_t stream) {
          check("masked_matmul_forward",
                masked_matmul_fwd_cuda(at<float>(x), at<float>(w), at<uint8_t>(mask), at<uint8_t>(live),
                                       at<float>(bias), n, o, k, relu, at<float>(y), at<void>(stream)));
        });
  m.def("masked_matmul_dx", [](uintptr_t dy, uintptr_t w, uintptr_t mask, uintptr_t live, int64_t n,
                               int64_t o, int64_t k, uintptr_t dx, uintptr_t stream) {
    check("masked_matmul_dx",
          masked_matmul_dx_cuda(at<float>(dy), at<float>(w), at<uint8_t>(mask), at<uint8_t>(live), n, o, k,
                                at<float>(dx), at<void>(stream)));
  });
  m.def("masked_matmul_dw", [](uintptr_t dy, uintptr_t x, uintptr_t mask, uintptr_t live, int64_t n,
                               int64_t o, int64_t k, uintptr_t dw, uintptr_t stream) {
    check("masked_matmul_dw",
          masked_matmul_dw_cuda(at<float>(dy), at<float>(x), at<uint8_t>(mask), at<uint8_t>(live), n, o, k,
                                at<float>(dw), at<void>(stream)));
  });
}

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "autoflip's CUDA kernels; use autoflip.ops, which checks what these functions take on trust";
  m.def("device_count", device_count_cuda, "number of CUDA devices, 0 without a driver");
  bind_masked_matmul(m);
}
