#include "cpu/masked_few.h"
#include "cpu/masked_matmul_simd.h"
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC bug 105593, in its own avxintrin.h
#endif

namespace autoflip {
namespace {

constexpr int64_t kChunk =
    8192;                 // floats of the samples in a chunk of columns: they fill the first-level cache
constexpr int kRows = 4;  // of the weight, that share what is loaded of the samples

AF_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
AF_INLINE int64_t words(int64_t cols) { return ceil_div(cols, 16); }
AF_INLINE __mmask16 live(int64_t cols) {
  return cols >= 16 ? __mmask16(0xffff) : __mmask16((1u << cols) - 1);
}

// y of R rows and N samples
template <int N, int R>
void few_forward(const float* w, const uint16_t* bits, const float* x, int64_t rows, int64_t cols,
                 const float* bias, bool relu, float* y) {
  vec sums[R][N];
  unroll<0, R * N>([&](auto i) AF_LAMBDA { sums[i.value / N][i.value % N] = vec{}; });
  const auto add = [&](int64_t k, __mmask16 some) AF_LAMBDA {
    vec ws[R];
    unroll<0, R>([&](auto r) AF_LAMBDA {
      ws[r.value] =
          _mm512_maskz_loadu_ps(__mmask16(bits[r.value * words(cols) + k / 16]), w + r.value * cols + k);
    });
    unroll<0, N>([&](auto i) AF_LAMBDA {
      const vec xs = _mm512_maskz_loadu_ps(some, x + i.value * cols + k);
      unroll<0, R>([&](auto r)
                       AF_LAMBDA { sums[r.value][i.value] = fma(ws[r.value], xs, sums[r.value][i.value]); });
    });
  };
  int64_t k = 0;
  for (; k + 16 <= cols; k += 16) add(k, 0xffff);
  if (k < cols) add(k, live(cols - k));
  unroll<0, R>([&](auto r) AF_LAMBDA {
    unroll<0, N>([&](auto i) AF_LAMBDA {
      const float sum = _mm512_reduce_add_ps(sums[r.value][i.value]) + (bias ? bias[r.value] : 0.0f);
      y[i.value * rows + r.value] = relu && sum < 0 ? 0 : sum;  // NaN stays NaN
    });
  });
}

template <int N>
void forward(const float* w, const uint16_t* bits, const float* x, int64_t rows, int64_t cols,
             const float* bias, bool relu, float* y, int threads) {
  constexpr int R = N > 4 ? 2 : kRows;
  const int64_t groups = rows / R;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t g = 0; g < groups; ++g)
    few_forward<N, R>(w + g * R * cols, bits + g * R * words(cols), x, rows, cols,
                      bias ? bias + g * R : nullptr, relu, y + g * R);
  for (int64_t r = groups * R; r < rows; ++r)
    few_forward<N, 1>(w + r * cols, bits + r * words(cols), x, rows, cols, bias ? bias + r : nullptr, relu,
                      y + r);
}

// dx of a chunk of columns += R rows of the weight
template <int N, int R>
void few_dx(const float* w, const uint16_t* bits, const float* dy, int64_t rows, int64_t cols, int64_t count,
            float* dx) {
  vec d[R][N];
  unroll<0, R * N>([&](auto i) AF_LAMBDA {
    d[i.value / N][i.value % N] = broadcast(dy[i.value % N * rows + i.value / N]);
  });
  const auto add = [&](int64_t k, __mmask16 some) AF_LAMBDA {
    vec ws[R];
    unroll<0, R>([&](auto r) AF_LAMBDA {
      const __mmask16 kept = bits[r.value * words(cols) + k / 16];
      ws[r.value] = _mm512_maskz_loadu_ps(kept, w + r.value * cols + k);
    });
    unroll<0, N>([&](auto i) AF_LAMBDA {
      float* at = dx + i.value * cols + k;
      vec sum = _mm512_maskz_loadu_ps(some, at);
      unroll<0, R>([&](auto r) AF_LAMBDA { sum = fma(ws[r.value], d[r.value][i.value], sum); });
      _mm512_mask_storeu_ps(at, some, sum);
    });
  };
  int64_t k = 0;
  for (; k + 16 <= count; k += 16) add(k, 0xffff);
  if (k < count) add(k, live(count - k));
}

// dw of R rows, a chunk of columns; adds to what stands there if `more`
template <int N, int R>
void few_dw(const uint16_t* bits, const float* dy, const float* x, int64_t rows, int64_t cols, int64_t count,
            bool more, float* dw) {
  vec d[R][N];
  unroll<0, R * N>([&](auto i) AF_LAMBDA {
    d[i.value / N][i.value % N] = broadcast(dy[i.value % N * rows + i.value / N]);
  });
  const auto put = [&](int64_t k, __mmask16 some) AF_LAMBDA {
    vec sums[R];
    const __mmask16 old = more ? some : __mmask16(0);
    unroll<0, R>([&](auto r)
                     AF_LAMBDA { sums[r.value] = _mm512_maskz_loadu_ps(old, dw + r.value * cols + k); });
    unroll<0, N>([&](auto i) AF_LAMBDA {
      const vec xs = _mm512_maskz_loadu_ps(some, x + i.value * cols + k);
      unroll<0, R>([&](auto r) AF_LAMBDA { sums[r.value] = fma(xs, d[r.value][i.value], sums[r.value]); });
    });
    unroll<0, R>([&](auto r) AF_LAMBDA {
      const __mmask16 kept = bits[r.value * words(cols) + k / 16];
      _mm512_mask_storeu_ps(dw + r.value * cols + k, some, _mm512_maskz_mov_ps(kept, sums[r.value]));
    });
  };
  int64_t k = 0;
  for (; k + 16 <= count; k += 16) put(k, 0xffff);
  if (k < count) put(k, live(count - k));
}

template <int N>
void backward(const float* w, const uint16_t* bits, const float* dy, const float* x, int64_t rows,
              int64_t cols, bool more, float* dx, float* dw, float* db, int threads) {
  constexpr int R = N > 4 ? 2 : kRows;
  // every thread gets a chunk
  const int64_t share = ceil_div(ceil_div(cols, threads), 16) * 16, size = least(kChunk / N / 16 * 16, share);
  const int64_t chunks = ceil_div(cols, size);
  if (db)
    for (int64_t r = 0; r < rows; ++r) {
      float sum = more ? db[r] : 0.0f;
      for (int i = 0; i < N; ++i) sum += dy[i * rows + r];
      db[r] = sum;
    }
#pragma omp parallel for num_threads(threads) if (threads > 1 && chunks > 1)
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t col = c * size, count = least(cols - col, size);
    if (dx)
      for (int i = 0; i < N; ++i)
        __builtin_memset(dx + i * cols + col, 0, std::size_t(count) * sizeof(float));
    const auto each = [&](auto at_once, auto rows_of) AF_LAMBDA {
      int64_t r = 0;
      for (; r + at_once.value <= rows; r += at_once.value) rows_of(r, at_once);
      for (; r < rows; ++r) rows_of(r, Int<1>{});
    };
    // one after the other: reading the weight and writing its gradient in turns takes a fifth longer
    if (dx)
      each(Int<N == 1 ? 8 : R>{}, [&](int64_t r, auto many) AF_LAMBDA {
        const uint16_t* here = bits + r * words(cols) + col / 16;
        few_dx<N, many.value>(w + r * cols + col, here, dy + r, rows, cols, count, dx + col);
      });
    if (dw)
      each(Int<N == 1 ? 1 : R>{}, [&](int64_t r, auto many) AF_LAMBDA {
        const uint16_t* here = bits + r * words(cols) + col / 16;
        few_dw<N, many.value>(here, dy + r, x + col, rows, cols, count, more, dw + r * cols + col);
      });
  }
}

// kFewSamples at a time, then those that are left: each(first sample, how many, as a constant)
template <class Each>
void by_few(int64_t n, const Each& each) {
  int64_t i = 0;
  for (; i + kFewSamples <= n; i += kFewSamples) each(i, Int<kFewSamples>{});
  unroll<1, kFewSamples>([&](auto left) {
    if (n - i == left.value) each(i, left);
  });
}

void any_forward(const float* w, const uint16_t* bits, const float* x, int64_t n, int64_t rows, int64_t cols,
                 const float* bias, bool relu, float* y, int threads) {
  by_few(n, [&](int64_t i, auto count) {
    forward<count.value>(w, bits, x + i * cols, rows, cols, bias, relu, y + i * rows, threads);
  });
}

void any_backward(const float* w, const uint16_t* bits, const float* dy, const float* x, int64_t n,
                  int64_t rows, int64_t cols, float* dx, float* dw, float* db, int threads) {
  if (n == 0 && dw) __builtin_memset(dw, 0, std::size_t(rows * cols) * sizeof(float));
  if (n == 0 && db) __builtin_memset(db, 0, std::size_t(rows) * sizeof(float));
  by_few(n, [&](int64_t i, auto count) {
    backward<count.value>(w, bits, dy + i * rows, dw ? x + i * cols : nullptr, rows, cols, i > 0,
                          dx ? dx + i * cols : nullptr, dw, db, threads);
  });
}

}  // namespace

extern const MaskedFew masked_few_avx512 = {any_forward, any_backward};

}  // namespace autoflip
