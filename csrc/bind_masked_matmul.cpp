// Masked products of single weights, of blocks of them, and for few samples. Addresses in.
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "bindings.h"
#include "common/cpu.h"
#include "common/scratch.h"
#include "cpu/masked_blocks.h"
#include "cpu/masked_every.h"
#include "cpu/masked_matmul_layout.h"
#include "masked_calls.h"

namespace py = pybind11;

namespace autoflip {
namespace {

const MaskedMatmul& kernels() { return AUTOFLIP_PICK(masked_matmul); }

int useful_threads(int64_t elements, int threads) { return elements < kSerialElements ? 1 : threads; }

py::bytes layout(uintptr_t mask, int64_t rows, int64_t cols, int64_t chunk, bool groups, bool back) {
  if (rows * cols > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("masked_matmul: a mask of 2^31 entries or more has no layout");
  std::vector<uint8_t> bytes;
  {
    py::gil_scoped_release release;
    bytes = masked_matmul_orders(at<const uint8_t>(mask), rows, cols, chunk, groups, back);
  }
  return py::bytes(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

void select(uintptr_t w, uintptr_t mask, int64_t n, int bytes, uintptr_t out, int threads) {
  py::gil_scoped_release release;
  kernels().select(at<const char>(w), at<const uint8_t>(mask), n, bytes, at<char>(out),
                   useful_threads(n, threads));
}

bool is_clean(uintptr_t w, uintptr_t mask, int64_t n, int bytes) {
  py::gil_scoped_release release;
  return kernels().is_clean(at<const char>(w), at<const uint8_t>(mask), n, bytes);
}

bool packs(uintptr_t lay, int64_t rows, int64_t cols, int64_t chunk) {
  return kernels().packs(masked_matmul_orders_at(at<const uint8_t>(lay), rows, cols, chunk));
}

const MaskedBlocks& block_kernels() { return AUTOFLIP_PICK(masked_blocks); }

Blocks blocks_at(uintptr_t lay, int64_t chunk, int height, int64_t rows, int64_t cols) {
  const Orders orders = masked_matmul_orders_at(at<const uint8_t>(lay), ceil_div(rows, height), cols, chunk);
  return {orders.lists, rows, height};
}

int64_t copied_values(uintptr_t lay, int64_t chunk, int height, int64_t rows, int64_t cols) {
  return copied(blocks_at(lay, chunk, height, rows, cols));
}

py::bytes few_bits(uintptr_t mask, int64_t rows, int64_t cols) {
  std::vector<uint8_t> bytes;
  {
    py::gil_scoped_release release;
    bytes = masked_few_bits(at<const uint8_t>(mask), rows, cols);
  }
  return py::bytes(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

}  // namespace

void masked_matmul_forward(uintptr_t x, uintptr_t weight, uintptr_t lay, int64_t chunk, uintptr_t bias,
                           int64_t n, int64_t rows, int64_t cols, bool relu, uintptr_t y, uintptr_t values,
                           int threads) {
  py::gil_scoped_release release;
  const MaskedMatmul& k = kernels();
  const Orders orders = masked_matmul_orders_at(at<const uint8_t>(lay), rows, cols, chunk);
  threads = threads_of_product(kept(orders.lists) * n, threads);
  Scratch& scratch = thread_scratch();
  k.forward(orders, at<const float>(weight), at<const float>(x), n, at<const float>(bias), relu, at<float>(y),
            at<float>(values), scratch.take(k.forward_scratch(orders, n)), threads);
  scratch.settle();
}

void masked_matmul_backward(uintptr_t dy, uintptr_t x, uintptr_t weight, uintptr_t values, uintptr_t lay,
                            int64_t chunk, int64_t n, int64_t rows, int64_t cols, uintptr_t dx, uintptr_t dw,
                            uintptr_t db, int threads) {
  py::gil_scoped_release release;
  const MaskedMatmul& k = kernels();
  const Orders orders = masked_matmul_orders_at(at<const uint8_t>(lay), rows, cols, chunk);
  threads = threads_of_product(kept(orders.lists) * n, threads);
  Scratch& scratch = thread_scratch();
  k.backward(orders, at<const float>(weight), at<const float>(values), at<const float>(dy),
             at<const float>(x), n, at<float>(dx), at<float>(dw), at<float>(db),
             scratch.take(k.backward_scratch(orders, n)), threads);
  scratch.settle();
}

bool masked_matmul_outer(uintptr_t dy, uintptr_t x, uintptr_t mask, uintptr_t bits, int64_t n, int64_t rows,
                         int64_t cols, uintptr_t dw, int threads) {
  const MaskedMatmul& k = kernels();
  if (!k.outer) return false;
  py::gil_scoped_release release;
  threads = useful_threads(n * cols, threads);
  Scratch& scratch = thread_scratch();
  k.outer(at<const float>(dy), at<const float>(x), {at<const uint8_t>(mask), at<const uint16_t>(bits)}, n,
          rows, cols, at<float>(dw), scratch.take(k.outer_scratch(n, rows)), threads);
  scratch.settle();
  return true;
}

// Whether AUTOFLIP_BACKEND leaves CPU tensors to this extension: os.environ takes ten times as long to ask.
bool masked_matmul_wanted() {
  const char* wish = std::getenv("AUTOFLIP_BACKEND");
  return !wish || !*wish || !std::strcmp(wish, "auto") || !std::strcmp(wish, "cpp");
}

void masked_blocks_forward(uintptr_t x, uintptr_t weight, uintptr_t lay, int64_t chunk, int height,
                           uintptr_t bias, int64_t n, int64_t rows, int64_t cols, bool relu, uintptr_t y,
                           uintptr_t values, int threads) {
  py::gil_scoped_release release;
  const Blocks blocks = blocks_at(lay, chunk, height, rows, cols);
  threads = threads_of_product(kept(blocks.lists) * height * n, threads);
  Scratch& scratch = thread_scratch();
  block_kernels().forward(blocks, at<const float>(weight), at<const float>(x), n, at<const float>(bias), relu,
                          at<float>(y), at<float>(values),
                          scratch.take(block_kernels().forward_scratch(blocks, n)), threads);
  scratch.settle();
}

void masked_blocks_backward(uintptr_t dy, uintptr_t x, uintptr_t weight, uintptr_t values, uintptr_t lay,
                            int64_t chunk, int height, int64_t n, int64_t rows, int64_t cols, uintptr_t dx,
                            uintptr_t dw, uintptr_t db, int threads) {
  py::gil_scoped_release release;
  const Blocks blocks = blocks_at(lay, chunk, height, rows, cols);
  threads = threads_of_product(kept(blocks.lists) * height * n, threads);
  Scratch& scratch = thread_scratch();
  block_kernels().backward(blocks, at<const float>(weight), at<const float>(values), at<const float>(dy),
                           at<const float>(x), n, at<float>(dx), at<float>(dw), at<float>(db),
                           scratch.take(block_kernels().backward_scratch(blocks, n)), threads);
  scratch.settle();
}

void masked_every_forward(uintptr_t w, uintptr_t bits, uintptr_t x, int64_t n, int64_t rows, int64_t cols,
                          uintptr_t bias, bool relu, uintptr_t y, int threads) {
  py::gil_scoped_release release;
  Scratch& scratch = thread_scratch();
  every_forward(at<const float>(w), at<const uint16_t>(bits), at<const float>(x), n, rows, cols,
                at<const float>(bias), relu, at<float>(y), scratch.take(every_scratch(n, rows, cols, false)),
                threads);
  scratch.settle();
}

void masked_every_backward(uintptr_t w, uintptr_t bits, uintptr_t dy, uintptr_t x, int64_t n, int64_t rows,
                           int64_t cols, uintptr_t dx, uintptr_t dw, uintptr_t db, int threads) {
  py::gil_scoped_release release;
  Scratch& scratch = thread_scratch();
  every_backward(at<const float>(w), at<const uint16_t>(bits), at<const float>(dy), at<const float>(x), n,
                 rows, cols, at<float>(dx), at<float>(dw), at<float>(db),
                 scratch.take(every_scratch(n, rows, cols, true)), threads);
  scratch.settle();
}

void bind_masked_matmul(py::module_& m) {
  m.def("masked_matmul_wanted", masked_matmul_wanted,
        "whether AUTOFLIP_BACKEND leaves CPU tensors to this extension");
  m.def("masked_matmul_layout", layout, "the orders of mask (rows, cols) with this many columns a chunk");
  m.def("masked_matmul_packs", packs, "whether masked_matmul_forward copies the kept weights");
  m.def("masked_matmul_select", select, "out = where(mask, w, 0); entries of 2, 4 or 8 bytes");
  m.def("masked_matmul_is_clean", is_clean, "whether w is zero wherever mask is not set");
  m.def("masked_matmul_forward", masked_matmul_forward,
        "y (n, rows) = act(x (n, cols) @ (w * mask).T + bias)");
  m.def("masked_matmul_backward", masked_matmul_backward,
        "dx (n, cols) = dy (n, rows) @ (w * mask); dw (rows, cols) = where(mask, dy.T @ x, 0); db (rows) = "
        "dy.sum(0)");
  m.def("masked_matmul_outer", masked_matmul_outer,
        "dw (rows, cols) = where(mask, dy.T @ x, 0), every product computed; takes masked_few_bits' address "
        "(or "
        "0) after the mask's; False: nothing done, a vendor is faster");
  m.def("masked_blocks_values", copied_values,
        "floats of the copy of the kept weights of these blocks; 0: forward makes none");
  m.def("masked_blocks_forward", masked_blocks_forward,
        "y (n, rows) = act(x (n, cols) @ (w * mask).T + bias) for a mask of blocks of `height` rows, whose "
        "layout is masked_matmul_layout's of the mask of blocks");
  m.def("masked_blocks_backward", masked_blocks_backward,
        "dx (n, cols) = dy (n, rows) @ (w * mask); dw (rows, cols) = where(mask, dy.T @ x, 0); db (rows) = "
        "dy.sum(0)");
  m.def("masked_every_together", every_together,
        "the samples that share what the functions below read of the weight; 0: not for this CPU");
  m.def("masked_every_tiles", every_tiles, "whether more samples than that meet tiles of the weight");
  m.def("masked_few_bits", few_bits,
        "a mask (rows, cols), 16 columns to a word, each row from a whole word on");
  m.def("masked_every_forward", masked_every_forward,
        "y (n, rows) = act(x (n, cols) @ (w * mask).T + bias), all products computed");
  m.def("masked_every_backward", masked_every_backward,
        "dx (n, cols) = dy (n, rows) @ (w * mask); dw (rows, cols) = where(mask, dy.T @ x, 0); db (rows) = "
        "dy.sum(0); all products computed");
}

}  // namespace autoflip
