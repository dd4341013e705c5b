// The kernels of masked_few.h, for the instruction set that the including source is compiled for.
#pragma once
#include "cpu/masked_few.h"
#include "cpu/masked_matmul_simd.h"
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC bug 105593, in its own avxintrin.h
#endif

namespace autoflip {
namespace {

constexpr int64_t kChunk =
    8192;  // floats of the samples in a chunk of columns: they fill the first-level cache

AF_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
AF_INLINE int64_t words(int64_t cols) { return ceil_div(cols, 16); }

// Lanes: which of a vector's entries count. kept: those of a row of bits from column k on. some: the first
// `cols`. Whole is true where all are there to be read.
#if defined(__AVX512F__)
using Lanes = __mmask16;
AF_INLINE Lanes kept(const uint16_t* bits, int64_t k) { return bits[k / 16]; }
AF_INLINE Lanes some(int64_t cols) { return cols >= 16 ? __mmask16(0xffff) : __mmask16((1u << cols) - 1); }
template <class Whole>
AF_INLINE vec load(const float* p, Lanes lanes, Whole) {
  return _mm512_maskz_loadu_ps(lanes, p);
}
template <class Whole>
AF_INLINE void store(float* p, vec v, Lanes lanes, Whole) {
  _mm512_mask_storeu_ps(p, lanes, v);
}
AF_INLINE vec only(Lanes lanes, vec v) { return _mm512_maskz_mov_ps(lanes, v); }
AF_INLINE float total(vec v) { return _mm512_reduce_add_ps(v); }
// rows of the weight that share what is loaded of N samples
constexpr int rows_of(int N) { return N > 4 ? 2 : 4; }
constexpr int kDxSamples = kFewSamples;  // that dx is made of at once
#else
using Lanes = __m256i;
struct LanesOf {
  int32_t byte[256][8] = {};

  constexpr LanesOf() {
    for (int b = 0; b < 256; ++b)
      for (int i = 0; i < 8; ++i) byte[b][i] = b >> i & 1 ? -1 : 0;
  }
};
alignas(32) constexpr LanesOf kLanesOf;
AF_INLINE Lanes kept(const uint16_t* bits, int64_t k) {
  const uint8_t byte = reinterpret_cast<const uint8_t*>(bits)[k / 8];
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(kLanesOf.byte[byte]));
}
AF_INLINE Lanes some(int64_t cols) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(least(cols, 8))),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
AF_INLINE vec only(Lanes lanes, vec v) { return _mm256_and_ps(v, _mm256_castsi256_ps(lanes)); }
template <class Whole>
AF_INLINE vec load(const float* p, Lanes lanes, Whole) {
  return Whole::value ? only(lanes, load(p)) : _mm256_maskload_ps(p, lanes);
}
template <class Whole>
AF_INLINE void store(float* p, vec v, Lanes lanes, Whole) {
  if constexpr (Whole::value)
    store(p, v);
  else
    _mm256_maskstore_ps(p, lanes, v);
}
AF_INLINE float total(vec v) {
  const __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 b = _mm_add_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_add_ss(b, _mm_shuffle_ps(b, b, 1)));
}
constexpr int rows_of(int N) { return N <= 2 ? 4 : N <= 4 ? 3 : 1; }  // 16 registers
constexpr int kDxSamples = 4;  // its sums lie in memory: of single rows they would be stored too often
#endif

// each(k, lanes that are there, Whole) for vectors of `cols` columns
template <class Each>
AF_INLINE void vectors(int64_t cols, const Each& each) {
  int64_t k = 0;
  for (; k + kVector <= cols; k += kVector) each(k, some(kVector), Int<true>{});
  if (k < cols) each(k, some(cols - k), Int<false>{});
}

// y of R rows and N samples
template <int N, int R>
void few_forward(const float* w, const uint16_t* bits, const float* x, int64_t rows, int64_t cols,
                 const float* bias, bool relu, float* y) {
  vec sums[R][N];
  unroll<0, R * N>([&](auto i) AF_LAMBDA { sums[i.value / N][i.value % N] = vec{}; });
  vectors(cols, [&](int64_t k, Lanes there, auto whole) AF_LAMBDA {
    vec ws[R];
    unroll<0, R>([&](auto r) AF_LAMBDA {
      ws[r.value] = load(w + r.value * cols + k, kept(bits + r.value * words(cols), k), whole);
    });
    unroll<0, N>([&](auto i) AF_LAMBDA {
      const vec xs = whole.value ? load(x + i.value * cols + k) : load(x + i.value * cols + k, there, whole);
      unroll<0, R>([&](auto r)
                       AF_LAMBDA { sums[r.value][i.value] = fma(ws[r.value], xs, sums[r.value][i.value]); });
    });
  });
  unroll<0, R>([&](auto r) AF_LAMBDA {
    unroll<0, N>([&](auto i) AF_LAMBDA {
      const float sum = total(sums[r.value][i.value]) + (bias ? bias[r.value] : 0.0f);
      y[i.value * rows + r.value] = relu && sum < 0 ? 0 : sum;  // NaN stays NaN
    });
  });
}

template <int N>
void forward(const float* w, const uint16_t* bits, const float* x, int64_t rows, int64_t cols,
             const float* bias, bool relu, float* y, int threads) {
  constexpr int R = rows_of(N);
  const int64_t groups = rows / R;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t g = 0; g < groups; ++g)
    few_forward<N, R>(w + g * R * cols, bits + g * R * words(cols), x, rows, cols,
                      bias ? bias + g * R : nullptr, relu, y + g * R);
  for (int64_t r = groups * R; r < rows; ++r)
    few_forward<N, 1>(w + r * cols, bits + r * words(cols), x, rows, cols, bias ? bias + r : nullptr, relu,
                      y + r);
}

// dy of R rows and N samples, each in all lanes
template <int N, int R>
AF_INLINE void broadcast_all(const float* dy, int64_t rows, vec (&d)[R][N]) {
  unroll<0, R * N>([&](auto i) AF_LAMBDA {
    d[i.value / N][i.value % N] = broadcast(dy[i.value % N * rows + i.value / N]);
  });
}

// dx of a chunk of columns += R rows of the weight
template <int N, int R>
void few_dx(const float* w, const uint16_t* bits, const float* dy, int64_t rows, int64_t cols, int64_t count,
            float* dx) {
  vec d[R][N];
  broadcast_all(dy, rows, d);
  vectors(count, [&](int64_t k, Lanes there, auto whole) AF_LAMBDA {
    vec ws[R];
    unroll<0, R>([&](auto r) AF_LAMBDA {
      ws[r.value] = load(w + r.value * cols + k, kept(bits + r.value * words(cols), k), whole);
    });
    unroll<0, N>([&](auto i) AF_LAMBDA {
      float* at = dx + i.value * cols + k;
      vec sum = whole.value ? load(at) : load(at, there, whole);
      unroll<0, R>([&](auto r) AF_LAMBDA { sum = fma(ws[r.value], d[r.value][i.value], sum); });
      store(at, sum, there, whole);
    });
  });
}

// dw of R rows, a chunk of columns; adds to what stands there if `more`
template <int N, int R>
void few_dw(const uint16_t* bits, const float* dy, const float* x, int64_t rows, int64_t cols, int64_t count,
            bool more, float* dw) {
  vec d[R][N];
  broadcast_all(dy, rows, d);
  vectors(count, [&](int64_t k, Lanes there, auto whole) AF_LAMBDA {
    vec sums[R];
    unroll<0, R>([&](auto r) AF_LAMBDA {
      sums[r.value] = more ? load(dw + r.value * cols + k, there, whole) : vec{};
    });
    unroll<0, N>([&](auto i) AF_LAMBDA {
      const vec xs = whole.value ? load(x + i.value * cols + k) : load(x + i.value * cols + k, there, whole);
      unroll<0, R>([&](auto r) AF_LAMBDA { sums[r.value] = fma(xs, d[r.value][i.value], sums[r.value]); });
    });
    unroll<0, R>([&](auto r) AF_LAMBDA {
      const vec sum = only(kept(bits + r.value * words(cols), k), sums[r.value]);
      store(dw + r.value * cols + k, sum, there, whole);
    });
  });
}

template <int N>
void backward(const float* w, const uint16_t* bits, const float* dy, const float* x, int64_t rows,
              int64_t cols, bool more, float* dx, float* dw, float* db, int threads) {
  constexpr int R = rows_of(N);
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
    if (dx) {
      const auto samples = [&](auto first, auto many_samples) AF_LAMBDA {
        constexpr int n = many_samples.value;
        each(Int<n == 1 ? 8 : rows_of(n)>{}, [&](int64_t r, auto many) AF_LAMBDA {
          const uint16_t* here = bits + r * words(cols) + col / 16;
          few_dx<n, many.value>(w + r * cols + col, here, dy + first.value * rows + r, rows, cols, count,
                                dx + first.value * cols + col);
        });
      };
      samples(Int<0>{}, Int<(N < kDxSamples ? N : kDxSamples)>{});
      if constexpr (N > kDxSamples) samples(Int<kDxSamples>{}, Int<N - kDxSamples>{});
    }
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
}  // namespace autoflip
