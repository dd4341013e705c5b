// Addresses in; scratch panels live in this file, one buffer per calling thread, kept between calls because
// fresh pages cost more than a small product.
#include <cstdlib>
#include <new>

#include "bindings.h"
#include "common/cpu.h"
#include "cpu/masked_matmul.h"

namespace py = pybind11;

namespace autoflip {
namespace {

const MaskedMatmul& kernels() { return pick(masked_matmul_base, masked_matmul_avx2, masked_matmul_avx512); }

class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  float* take(int64_t floats) {
    if (floats > size_) {
      std::free(data_);
      size_ = 0;
      data_ = static_cast<float*>(std::aligned_alloc(64, size_t(ceil_div(floats, 16) * 64)));
      if (!data_) throw std::bad_alloc();
      size_ = floats;
    }
    return data_;
  }
  // A buffer for one huge call must not stay for good.
  void settle() {
    constexpr int64_t kKeep = int64_t(1) << 24;  // floats: 64 MB
    if (size_ <= kKeep) return;
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};
thread_local Scratch scratch;

Layout layout_at(uintptr_t address, int64_t rows, int64_t cols) {
  const int64_t entries = ceil_div(rows, kGroup) * ceil_div(cols, kChunk) * kTable;
  const int32_t* table = at<const int32_t>(address);
  return {table, reinterpret_cast<const uint8_t*>(table + entries), rows, cols};
}

int64_t padded(int64_t n) { return ceil_div(n, kernels().vector) * kernels().vector; }

int useful_threads(int64_t elements, int threads) { return elements < kSerialElements ? 1 : threads; }

int64_t layout(uintptr_t mask, int64_t rows, int64_t cols, bool transposed, uintptr_t out) {
  py::gil_scoped_release release;
  return masked_matmul_layout(at<const uint8_t>(mask), rows, cols, transposed, at<uint8_t>(out));
}

int64_t layout_bound(int64_t rows, int64_t cols, bool transposed) {
  return transposed ? masked_matmul_layout_bound(cols, rows) : masked_matmul_layout_bound(rows, cols);
}

void select(uintptr_t w, uintptr_t mask, int64_t n, uintptr_t out, int threads) {
  py::gil_scoped_release release;
  kernels().select(at<const float>(w), at<const uint8_t>(mask), n, at<float>(out),
                   useful_threads(n, threads));
}

bool is_clean(uintptr_t w, uintptr_t mask, int64_t n) {
  py::gil_scoped_release release;
  return kernels().is_clean(at<const float>(w), at<const uint8_t>(mask), n);
}

void forward(uintptr_t x, uintptr_t weight, uintptr_t lay, uintptr_t bias, int64_t n, int64_t rows,
             int64_t cols, bool relu, uintptr_t y, int threads) {
  py::gil_scoped_release release;
  const MaskedMatmul& k = kernels();
  threads = useful_threads(n * cols, threads);
  float* panels = scratch.take(padded(n) * cols);
  k.to_panels(at<const float>(x), n, cols, panels, threads);
  k.multiply(layout_at(lay, rows, cols), {at<const float>(weight), cols, 1}, panels, n, at<const float>(bias),
             relu, at<float>(y), threads);
  scratch.settle();
}

void dx(uintptr_t dy, uintptr_t weight, uintptr_t transposed_lay, int64_t n, int64_t rows, int64_t cols,
        uintptr_t out, int threads) {
  py::gil_scoped_release release;
  const MaskedMatmul& k = kernels();
  threads = useful_threads(n * rows, threads);
  float* panels = scratch.take(padded(n) * rows);
  k.to_panels(at<const float>(dy), n, rows, panels, threads);
  k.multiply(layout_at(transposed_lay, cols, rows), {at<const float>(weight), 1, cols}, panels, n, nullptr,
             false, at<float>(out), threads);
  scratch.settle();
}

void dw(uintptr_t dy, uintptr_t x, uintptr_t lay, int64_t n, int64_t rows, int64_t cols, uintptr_t out,
        int threads) {
  py::gil_scoped_release release;
  const MaskedMatmul& k = kernels();
  threads = useful_threads(n * cols, threads);
  float* x_panels = scratch.take(padded(n) * (rows + cols));
  float* dy_panels = x_panels + padded(n) * cols;
  k.to_panels(at<const float>(x), n, cols, x_panels, threads);
  k.to_panels(at<const float>(dy), n, rows, dy_panels, threads);
  k.sample(layout_at(lay, rows, cols), dy_panels, x_panels, n, at<float>(out), threads);
  scratch.settle();
}

}  // namespace

void bind_masked_matmul(py::module_& m) {
  m.def("masked_matmul_layout_bound", layout_bound, "most bytes that masked_matmul_layout can write");
  m.def("masked_matmul_layout", layout,
        "fills the layout of mask (rows, cols) or of its transpose; bytes written");
  m.def("masked_matmul_select", select, "out = where(mask, w, 0)");
  m.def("masked_matmul_is_clean", is_clean, "whether w is zero wherever mask is not set");
  m.def("masked_matmul_forward", forward, "y (n, rows) = act(x (n, cols) @ (w * mask).T + bias)");
  m.def("masked_matmul_dx", dx, "dx (n, cols) = dy (n, rows) @ (w * mask)");
  m.def("masked_matmul_dw", dw, "dw (rows, cols) = dy.T @ x where mask, untouched elsewhere");
}

}  // namespace autoflip
