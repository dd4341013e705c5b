// Addresses in.
#include <stdexcept>

#include "bindings.h"
#include "common/cpu.h"
#include "cpu/masked_few.h"
#include "masked_calls.h"

namespace py = pybind11;

namespace autoflip {
namespace {

int useful_threads(int64_t elements, int threads) { return elements < kSerialElements ? 1 : threads; }

#if defined(__x86_64__)
const MaskedFew& kernels() { return cpu_isa() == Isa::avx512 ? masked_few_avx512 : masked_few_avx2; }
#else
const MaskedFew& kernels() { throw std::logic_error("masked_few: no kernel for this CPU"); }
#endif

// the samples that share what is read of the weight; 0: there are no kernels for this CPU
int64_t together() { return cpu_isa() == Isa::base ? 0 : kFewSamples; }

py::bytes bits(uintptr_t mask, int64_t rows, int64_t cols) {
  std::vector<uint8_t> bytes;
  {
    py::gil_scoped_release release;
    bytes = masked_few_bits(at<const uint8_t>(mask), rows, cols);
  }
  return py::bytes(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

}  // namespace

void masked_few_forward(uintptr_t w, uintptr_t bits, uintptr_t x, int64_t n, int64_t rows, int64_t cols,
                        uintptr_t bias, bool relu, uintptr_t y, int threads) {
  py::gil_scoped_release release;
  kernels().forward(at<const float>(w), at<const uint16_t>(bits), at<const float>(x), n, rows, cols,
                    at<const float>(bias), relu, at<float>(y), useful_threads(rows * cols, threads));
}

void masked_few_backward(uintptr_t w, uintptr_t bits, uintptr_t dy, uintptr_t x, int64_t n, int64_t rows,
                         int64_t cols, uintptr_t dx, uintptr_t dw, uintptr_t db, int threads) {
  py::gil_scoped_release release;
  kernels().backward(at<const float>(w), at<const uint16_t>(bits), at<const float>(dy), at<const float>(x), n,
                     rows, cols, at<float>(dx), at<float>(dw), at<float>(db),
                     useful_threads(rows * cols, threads));
}

void bind_few(py::module_& m) {
  m.def("masked_few_together", together,
        "the samples that share what the functions below read of the weight; 0: not for this CPU");
  m.def("masked_few_bits", bits, "a mask (rows, cols), 16 columns to a word, each row from a whole word on");
  m.def("masked_few_forward", masked_few_forward,
        "y (n, rows) = act(x (n, cols) @ (w * mask).T + bias), all products computed");
  m.def("masked_few_backward", masked_few_backward,
        "dx (n, cols) = dy (n, rows) @ (w * mask); dw (rows, cols) = where(mask, dy.T @ x, 0); db (rows) = "
        "dy.sum(0); all products computed");
}

}  // namespace autoflip
