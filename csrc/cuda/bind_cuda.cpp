// autoflip._cuda: addresses, sizes and a stream in. Every launcher returns cudaGetLastError(); check() raises
// it. A family declares its launchers here, right before its bind function, and adds one line to
// PYBIND11_MODULE.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
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

// --- delta

extern "C" {
int delta_gather_cuda(const float* x, const float* base, const uint32_t* words, const int64_t* offsets,
                      int64_t n, float* out, int* bad, void* stream);
int delta_quantise_cuda(const float* x, int64_t n, float levels, float largest, uint32_t key0, uint32_t key1,
                        bool nearest, int8_t* codes, float* scales, void* stream);
int delta_round_cuda(const float* x, int64_t n, uint32_t key0, uint32_t key1, bool nearest, uint16_t* words,
                     void* stream);
int delta_expand_cuda(const void* values, const float* scales, const uint32_t* words, const int64_t* offsets,
                      int64_t n, float weight, bool add, float* out, void* stream);
}

static void bind_delta(py::module_& m) {
  m.def("delta_gather", [](uintptr_t x, uintptr_t base, uintptr_t words, uintptr_t offsets, int64_t n,
                           uintptr_t out, uintptr_t bad, uintptr_t stream) {
    check("delta_gather",
          delta_gather_cuda(at<float>(x), at<float>(base), at<uint32_t>(words), at<int64_t>(offsets), n,
                            at<float>(out), at<int>(bad), at<void>(stream)));
  });
  m.def(
      "delta_quantise", [](uintptr_t x, int64_t n, float levels, float largest, uint32_t key0, uint32_t key1,
                           bool nearest, uintptr_t codes, uintptr_t scales, uintptr_t stream) {
        check("delta_quantise", delta_quantise_cuda(at<float>(x), n, levels, largest, key0, key1, nearest,
                                                    at<int8_t>(codes), at<float>(scales), at<void>(stream)));
      });
  m.def("delta_round", [](uintptr_t x, int64_t n, uint32_t key0, uint32_t key1, bool nearest, uintptr_t words,
                          uintptr_t stream) {
    check("delta_round",
          delta_round_cuda(at<float>(x), n, key0, key1, nearest, at<uint16_t>(words), at<void>(stream)));
  });
  m.def("delta_expand", [](uintptr_t values, uintptr_t scales, uintptr_t words, uintptr_t offsets, int64_t n,
                           float weight, bool add, uintptr_t out, uintptr_t stream) {
    check("delta_expand",
          delta_expand_cuda(at<void>(values), at<float>(scales), at<uint32_t>(words), at<int64_t>(offsets), n,
                            weight, add, at<float>(out), at<void>(stream)));
  });
}

// --- hessian

extern "C" {
int squared_matmul_cuda(const float* d, const float* a, int64_t n, int64_t o, int64_t k, int squared,
                        float* out, void* stream);
int conv_squares_cuda(const float* d, const float* x, const int64_t* sizes, float* out, void* stream);
int rademacher_cuda(uint64_t start, int64_t count, float* out, void* stream);
}

static void bind_hessian(py::module_& m) {
  m.def("squared_matmul", [](uintptr_t d, uintptr_t a, int64_t n, int64_t o, int64_t k, bool squared,
                             uintptr_t out, uintptr_t stream) {
    check("squared_matmul", squared_matmul_cuda(at<float>(d), at<float>(a), n, o, k, squared, at<float>(out),
                                                at<void>(stream)));
  });
  m.def("conv_squares",
        [](uintptr_t d, uintptr_t x, const std::array<int64_t, 24>& sizes, uintptr_t out, uintptr_t stream) {
          check("conv_squares", conv_squares_cuda(at<float>(d), at<float>(x), sizes.data(), at<float>(out),
                                                  at<void>(stream)));
        });
  m.def("rademacher", [](uint64_t start, int64_t count, uintptr_t out, uintptr_t stream) {
    check("rademacher", rademacher_cuda(start, count, at<float>(out), at<void>(stream)));
  });
}

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "autoflip's CUDA kernels; use autoflip.ops, which checks what these functions take on trust";
  m.def("device_count", device_count_cuda, "number of CUDA devices, 0 without a driver");
  bind_masked_matmul(m);
  bind_delta(m);
  bind_hessian(m);
}
