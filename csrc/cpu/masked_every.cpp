#include "cpu/masked_every.h"

#include <stdexcept>

#include "common/cpu.h"

namespace autoflip {
namespace {

const MaskedMatmul& kernels() { return AUTOFLIP_PICK(masked_matmul); }

#if defined(__x86_64__)
const MaskedFew& few() { return cpu_isa() == Isa::avx512 ? masked_few_avx512 : masked_few_avx2; }
#else
const MaskedFew& few() { throw std::logic_error("masked_few: no kernel for this CPU"); }
#endif

bool by_tiles(int64_t n) { return n > kFewSamples && every_tiles(); }

// Whether dw of few samples is left to tiles: where its rows do not begin with a cache line every store meets
// two, and tiles store less often.
bool dw_by_tiles(int64_t n, int64_t cols) { return n > kFewSamples / 2 && cols % 16 && every_tiles(); }

// threads for what reads the weight once
int threads_of_weight(int64_t entries, int threads) { return entries < kSerialElements ? 1 : threads; }

}  // namespace

int64_t every_together() { return cpu_isa() == Isa::base ? 0 : kFewSamples; }

bool every_tiles() { return kernels().every_forward != nullptr; }

int64_t every_scratch(int64_t n, int64_t rows, int64_t cols, bool back) {
  if (!back) return by_tiles(n) ? kernels().every_scratch(n, rows, cols) : 0;
  return by_tiles(n) || dw_by_tiles(n, cols) ? kernels().outer_scratch(n, rows) : 0;
}

void every_forward(const float* w, const uint16_t* bits, const float* x, int64_t n, int64_t rows,
                   int64_t cols, const float* bias, bool relu, float* y, float* scratch, int threads) {
  if (by_tiles(n))
    return kernels().every_forward(w, bits, x, n, rows, cols, bias, relu, y, scratch,
                                   threads_of_product(rows * cols * n, threads));
  few().forward(w, bits, x, n, rows, cols, bias, relu, y, threads_of_weight(rows * cols, threads));
}

void every_backward(const float* w, const uint16_t* bits, const float* dy, const float* x, int64_t n,
                    int64_t rows, int64_t cols, float* dx, float* dw, float* db, float* scratch,
                    int threads) {
  const MaskedMatmul& k = kernels();
  const Kept kept = {nullptr, bits};
  if (by_tiles(n)) {
    threads = threads_of_product(rows * cols * n, threads);
    if (dx) k.every_back(w, bits, dy, n, rows, cols, dx, threads);
    if (dw) k.outer(dy, x, kept, n, rows, cols, dw, scratch, threads);
    if (db) k.sum_samples(dy, n, rows, db);
    return;
  }
  threads = threads_of_weight(rows * cols, threads);
  // a weight that the cache holds is read strip by strip, and the sums of its columns stay in registers
  if (dx && n > 1 && k.every_back && rows * cols < kPackFrom) {
    k.every_back(w, bits, dy, n, rows, cols, dx, threads);
    dx = nullptr;
  }
  if (dw && dw_by_tiles(n, cols)) {
    k.outer(dy, x, kept, n, rows, cols, dw, scratch, threads);
    dw = nullptr;
  }
  few().backward(w, bits, dy, x, n, rows, cols, dx, dw, db, threads);
}

}  // namespace autoflip
