// Vectors of the instruction set that the including source is compiled for, and tasks dealt to threads.
//
// Accumulators live in registers only while every loop over them is unrolled at compile time: hence unroll<>.
#pragma once
#include <cstddef>
#include <utility>

#include "cpu/masked_matmul.h"
#if defined(__AVX2__)
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC bug 105593, in its own avx512fintrin.h
// where it knows a stride it tells us that 2^55 rows would be too many
#pragma GCC diagnostic ignored "-Waggressive-loop-optimizations"
#endif
#endif

#define AF_INLINE inline __attribute__((always_inline))
#define AF_LAMBDA __attribute__((always_inline))

namespace autoflip {
namespace {

#if defined(__AVX512F__)
constexpr int kVector = 16, kVectors = 4, kAlone = 4;  // 16 sums + 4 inputs of 32 registers
typedef __m512 vec;
AF_INLINE vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
AF_INLINE vec broadcast(float f) { return _mm512_set1_ps(f); }
#elif defined(__AVX2__)
constexpr int kVector = 8, kVectors = 3, kAlone = 4;  // 12 sums + 3 inputs + 1 weight: all 16 registers
typedef __m256 vec;
AF_INLINE vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
AF_INLINE vec broadcast(float f) { return _mm256_set1_ps(f); }
#else
constexpr int kVector = 4, kVectors = 2, kAlone = 2;
typedef float vec __attribute__((vector_size(16)));
AF_INLINE vec fma(vec a, vec b, vec c) { return a * b + c; }
AF_INLINE vec broadcast(float f) { return vec{f, f, f, f}; }
#endif
// sums of products whose lanes are to be summed up are kept in vectors of 8 at most: folding wider ones costs
// more than computing in them saves
#if defined(__AVX512F__)
constexpr int kHalf = 8;
typedef __m256 half;
AF_INLINE half fma(half a, half b, half c) { return _mm256_fmadd_ps(a, b, c); }
AF_INLINE half fold(vec v) { return _mm512_castps512_ps256(v) + _mm512_extractf32x8_ps(v, 1); }
#else
constexpr int kHalf = kVector;
typedef vec half;
AF_INLINE half fold(vec v) { return v; }
#endif
typedef half unaligned_half __attribute__((aligned(4), may_alias));
AF_INLINE half load_half(const float* p) { return *reinterpret_cast<const unaligned_half*>(p); }
typedef vec unaligned_vec __attribute__((aligned(4), may_alias));
// kVectors: of a panel that rows meet four at a time; kAlone: of one that they meet one by one, which leaves
// room for more
constexpr int64_t kLanes = kVector * kVectors, kAloneLanes = kVector * kAlone;

AF_INLINE vec load(const float* p) { return *reinterpret_cast<const unaligned_vec*>(p); }
AF_INLINE void store(float* p, vec v) { *reinterpret_cast<unaligned_vec*>(p) = v; }

template <int I>
struct Int {
  static constexpr int value = I;
};
// f(task) of each task, dealt to the threads one by one: tasks are uneven, so equal shares would wait for the
// longest. One thread makes no region.
template <class F>
AF_INLINE void deal(int64_t tasks, int threads, const F& f) {
  if (threads == 1 || tasks < 2) {
    for (int64_t t = 0; t < tasks; ++t) f(t);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t t = 0; t < tasks; ++t) f(t);
}

template <int Begin, int End, class F>
AF_INLINE void unroll(F&& f) {
  if constexpr (Begin < End) {
    f(Int<Begin>{});
    unroll<Begin + 1, End>(f);
  }
}
constexpr int popcount(int p) { return p ? (p & 1) + popcount(p >> 1) : 0; }
// the i-th row that pattern p keeps
constexpr int row_of(int p, int i) {
  int r = 0;
  while (!((p >> r) & 1) || i-- > 0) ++r;
  return r;
}

// One function for each number of vectors that a panel may be wide: of(V) as make(Int<V>{}) gives it.
template <class F, int Most>
struct Widths {
  F at[Most];
  constexpr F of(int64_t vectors) const { return at[vectors - 1]; }
};
template <class Make, std::size_t... I>
constexpr auto widths(Make make, std::index_sequence<I...>) {
  return Widths<decltype(make(Int<1>{})), sizeof...(I)>{{make(Int<int(I) + 1>{})...}};
}
template <int Most = kVectors, class Make>
constexpr auto widths(Make make) {
  return widths(make, std::make_index_sequence<Most>{});
}

// to[at[j]] = from[j]; Index: uint16_t or int32_t, none negative. Eight at a time are read before one is
// stored: a load that a CPU has once seen, or thought to see, hit by an earlier store waits for the addresses
// of all of them from then on, which here are loaded themselves (Zen 1: 8 cycles an entry instead of 1.5).
template <class Index>
AF_INLINE void put(const float* from, const Index* at, int64_t count, float* to) {
  int64_t j = 0;
#if defined(__AVX2__)
  constexpr int kEach = 8 / sizeof(Index), kBits = 8 * sizeof(Index);  // of a word
  for (; j + 8 <= count; j += 8) {
    uint64_t places[8 / kEach], pairs[4];
    __builtin_memcpy(places, at + j, sizeof places);
    __builtin_memcpy(pairs, from + j, sizeof pairs);
    unroll<0, 8>([&](auto i) AF_LAMBDA {
      const uint64_t place =
          places[i.value / kEach] >> kBits * (i.value % kEach) & ((uint64_t{1} << kBits) - 1);
      const uint32_t value = uint32_t(pairs[i.value / 2] >> 32 * (i.value % 2));
      __builtin_memcpy(to + place, &value, sizeof value);
    });
  }
#endif
  for (; j < count; ++j) to[at[j]] = from[j];
}

#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr bool kAheadPays = true;
#else
constexpr bool kAheadPays = false;  // not measured there
#endif
// The numbers of columns as a list names them, N of them read ahead if so: what waits for a number to arrive
// takes up the queue of the loads behind it (Zen 1: 6.3 cycles a column of 4 vectors without, 5.0 with).
// Reads N numbers past the last one.
template <int N, bool Ahead>
class Numbers {
 public:
  AF_INLINE explicit Numbers(const uint16_t* at) {
    if constexpr (Ahead) unroll<0, N>([&](auto i) AF_LAMBDA { ahead_[i.value] = at[i.value]; });
  }
  // at[I], one of N that are taken in a row
  template <int I>
  AF_INLINE int64_t take(const uint16_t* at, Int<I>) {
    if constexpr (!Ahead) return at[I];
    const int64_t k = ahead_[I];
    ahead_[I] = read(at + N + I);
    return k;
  }
  // at[0], one by itself
  AF_INLINE int64_t next(const uint16_t* at) {
    if constexpr (!Ahead) return *at;
    const int64_t k = ahead_[0];
    unroll<1, N>([&](auto i) AF_LAMBDA { ahead_[i.value - 1] = ahead_[i.value]; });
    ahead_[N - 1] = read(at + N);
    return k;
  }

 private:
  static AF_INLINE int64_t read(const uint16_t* at) {
    int64_t number = *at;
    asm volatile("" : "+r"(number));  // here, not where it is used; of a member it would be kept in memory
    return number;
  }
  int64_t ahead_[N];
};

struct Panel {
  int64_t begin, count, width;  // samples; width is count rounded up to whole vectors
};
// As wide as each other: 200 samples in 48, 48, 48 and 64 lanes, not in three times 64 and 8, which do half
// as much with a load. Divides, so not for an inner loop.
AF_INLINE Panel panel(int64_t i, int64_t n, int64_t lanes = kLanes) {
  if (n <= lanes) return {0, n, ceil_div(n, kVector) * kVector};
  const int64_t vectors = ceil_div(n, kVector), panels = ceil_div(n, lanes);
  const int64_t begin = i * vectors / panels * kVector, width = (i + 1) * vectors / panels * kVector - begin;
  return {begin, n - begin < width ? n - begin : width, width};
}

// the sums of the lanes of four vectors
AF_INLINE void sum_lanes(const vec* v, float* out) {
#if defined(__AVX512F__)
  const vec a = _mm512_unpacklo_ps(v[0], v[1]) + _mm512_unpackhi_ps(v[0], v[1]);
  const vec b = _mm512_unpacklo_ps(v[2], v[3]) + _mm512_unpackhi_ps(v[2], v[3]);
  const vec c = _mm512_shuffle_ps(a, b, 0x44) + _mm512_shuffle_ps(a, b, 0xee);
  const __m256 d = _mm512_castps512_ps256(c) + _mm512_extractf32x8_ps(c, 1);
  _mm_storeu_ps(out, _mm256_castps256_ps128(d) + _mm256_extractf128_ps(d, 1));
#elif defined(__AVX2__)
  const vec a = _mm256_unpacklo_ps(v[0], v[1]) + _mm256_unpackhi_ps(v[0], v[1]);
  const vec b = _mm256_unpacklo_ps(v[2], v[3]) + _mm256_unpackhi_ps(v[2], v[3]);
  const vec d = _mm256_shuffle_ps(a, b, 0x44) + _mm256_shuffle_ps(a, b, 0xee);
  _mm_storeu_ps(out, _mm256_castps256_ps128(d) + _mm256_extractf128_ps(d, 1));
#else
  for (int i = 0; i < 4; ++i) out[i] = (v[i][0] + v[i][2]) + (v[i][1] + v[i][3]);
#endif
}

#if defined(__AVX512F__)
// the sums of the lanes of sixteen vectors; one association of terms for both sizes of block, so a weight's
// gradient does not depend on which block its column fell into
AF_INLINE void sum_lanes16(const vec* v, float* out) {
  vec u[4];
  unroll<0, 4>([&](auto i) AF_LAMBDA {
    constexpr int j = 4 * decltype(i)::value;
    const vec a = _mm512_unpacklo_ps(v[j], v[j + 1]) + _mm512_unpackhi_ps(v[j], v[j + 1]);
    const vec b = _mm512_unpacklo_ps(v[j + 2], v[j + 3]) + _mm512_unpackhi_ps(v[j + 2], v[j + 3]);
    u[i.value] = _mm512_shuffle_ps(a, b, 0x44) + _mm512_shuffle_ps(a, b, 0xee);
  });
  const vec s = _mm512_shuffle_f32x4(u[0], u[1], 0x44) + _mm512_shuffle_f32x4(u[0], u[1], 0xee);
  const vec t = _mm512_shuffle_f32x4(u[2], u[3], 0x44) + _mm512_shuffle_f32x4(u[2], u[3], 0xee);
  _mm512_storeu_ps(out, _mm512_shuffle_f32x4(s, t, 0x88) + _mm512_shuffle_f32x4(s, t, 0xdd));
}
#endif

// out[j] = the sum of the lanes of v[j] (plus out[j] unless `first`), j < 4, 8 or 16; one
// association of terms for all counts, so a weight's gradient does not depend on how many columns were summed
// with its own
#if defined(__AVX2__)
AF_INLINE __m256 pair256(__m256 a, __m256 b) { return _mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b); }
AF_INLINE __m256 four256(const __m256* v) {
  const __m256 a = pair256(v[0], v[1]), b = pair256(v[2], v[3]);
  return _mm256_shuffle_ps(a, b, 0x44) + _mm256_shuffle_ps(a, b, 0xee);
}
template <int Columns>
AF_INLINE void sum_halves(const __m256* v, bool first, float* out) {
  if constexpr (Columns == 4 ||
                kVector == 8) {  // moving halves takes Zen 1 eight operations, taking one out one
    unroll<0, Columns / 4>([&](auto i) AF_LAMBDA {
      const __m256 a = four256(v + 4 * i.value);
      const __m128 sum = _mm256_castps256_ps128(a) + _mm256_extractf128_ps(a, 1);
      float* to = out + 4 * i.value;
      _mm_storeu_ps(to, first ? sum : sum + _mm_loadu_ps(to));
    });
  } else {
    unroll<0, Columns / 8>([&](auto i) AF_LAMBDA {
      const __m256 a = four256(v + 8 * i.value), b = four256(v + 8 * i.value + 4);
      const __m256 sum = _mm256_permute2f128_ps(a, b, 0x20) + _mm256_permute2f128_ps(a, b, 0x31);
      float* to = out + 8 * i.value;
      _mm256_storeu_ps(to, first ? sum : sum + _mm256_loadu_ps(to));
    });
  }
}
#else
template <int Columns>
AF_INLINE void sum_halves(const vec* v, bool first, float* out) {
  static_assert(Columns == 4);
  for (int i = 0; i < 4; ++i) {
    const float sum = (v[i][0] + v[i][2]) + (v[i][1] + v[i][3]);
    out[i] = first ? sum : out[i] + sum;
  }
}
#endif
}  // namespace
}  // namespace autoflip
