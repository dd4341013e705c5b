// Addresses in.
#include "bindings.h"
#include "common/cpu.h"
#include "common/scratch.h"
#include "cpu/masked_blocks.h"
#include "cpu/masked_matmul_layout.h"
#include "masked_calls.h"

namespace py = pybind11;

namespace autoflip {
namespace {

const MaskedBlocks& kernels() { return pick(masked_blocks_base, masked_blocks_avx2, masked_blocks_avx512); }

Blocks blocks_at(uintptr_t lay, int64_t chunk, int height, int64_t rows, int64_t cols) {
  const Orders orders = masked_matmul_orders_at(at<const uint8_t>(lay), ceil_div(rows, height), cols, chunk);
  return {orders.lists, rows, height};
}

int64_t values(uintptr_t lay, int64_t chunk, int height, int64_t rows, int64_t cols) {
  return copied(blocks_at(lay, chunk, height, rows, cols));
}

}  // namespace

void masked_blocks_forward(uintptr_t x, uintptr_t weight, uintptr_t lay, int64_t chunk, int height,
                           uintptr_t bias, int64_t n, int64_t rows, int64_t cols, bool relu, uintptr_t y,
                           uintptr_t values, int threads) {
  py::gil_scoped_release release;
  const Blocks blocks = blocks_at(lay, chunk, height, rows, cols);
  threads = threads_of_product(kept(blocks.lists) * height * n, threads);
  Scratch& scratch = thread_scratch();
  kernels().forward(blocks, at<const float>(weight), at<const float>(x), n, at<const float>(bias), relu,
                    at<float>(y), at<float>(values), scratch.take(kernels().forward_scratch(blocks, n)),
                    threads);
  scratch.settle();
}

void masked_blocks_backward(uintptr_t dy, uintptr_t x, uintptr_t weight, uintptr_t values, uintptr_t lay,
                            int64_t chunk, int height, int64_t n, int64_t rows, int64_t cols, uintptr_t dx,
                            uintptr_t dw, uintptr_t db, int threads) {
  py::gil_scoped_release release;
  const Blocks blocks = blocks_at(lay, chunk, height, rows, cols);
  threads = threads_of_product(kept(blocks.lists) * height * n, threads);
  Scratch& scratch = thread_scratch();
  kernels().backward(blocks, at<const float>(weight), at<const float>(values), at<const float>(dy),
                     at<const float>(x), n, at<float>(dx), at<float>(dw), at<float>(db),
                     scratch.take(kernels().backward_scratch(blocks, n)), threads);
  scratch.settle();
}

void bind_blocks(py::module_& m) {
  m.def("masked_blocks_values", values,
        "floats of the copy of the kept weights of these blocks; 0: forward makes none");
  m.def("masked_blocks_forward", masked_blocks_forward,
        "y (n, rows) = act(x (n, cols) @ (w * mask).T + bias) for a mask of blocks of `height` rows, whose "
        "layout is masked_matmul_layout's of the mask of blocks");
  m.def("masked_blocks_backward", masked_blocks_backward,
        "dx (n, cols) = dy (n, rows) @ (w * mask); dw (rows, cols) = where(mask, dy.T @ x, 0); db (rows) = "
        "dy.sum(0)");
}

}  // namespace autoflip
