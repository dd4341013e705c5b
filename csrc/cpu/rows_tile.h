// Rows times a packed panel of columns, kept in registers: in float32, or in bfloat16 with float32 sums.
//
// Both kinds move 32-bit words. A word is a float, or two neighbouring values of the inner dimension as
// bfloat16: half the words for the same product.
#pragma once
#include <cstdint>

#include "cpu/hessian_simd.h"

namespace {

constexpr int64_t kPanel = 4 * W;  // columns of a panel, words next to each other

struct Floats {
  using In = Vec;
  static constexpr int64_t kValues = 1;      // of a word
  static constexpr float kNegligible = 0.f;  // what a sum's terms may lack together, of the largest
  static In panel(const float* words) { return load(words); }
  static In row(const float* word) { return splat(*word); }
  static Vec mad(In a, In b, Vec c) { return fma(a, b, c); }
  static uint32_t size(uint32_t word) { return word & 0x7fffffffu; }  // as a float's bits, which sort like it
  static void words(float*, int64_t) {}
  static constexpr bool kTiled = false;                  // a block's rows lie one behind the other
  static int64_t whole(int64_t words) { return words; }  // that many are computed, zeros behind
  struct Held {
    ~Held() {}  // so that one which is only held counts as used
  };
};

#if defined(__AVX512BF16__)
// To the nearest, ties to even; NaN stays NaN.
inline void round_to_bf16(const float* from, int64_t count, uint16_t* to) {
  int64_t i = 0;
  for (; i + W <= count; i += W) {
    __m256bh some = _mm512_cvtneps_pbh(load(from + i));
    __builtin_memcpy(to + i, &some, sizeof some);
  }
  if (i == count) return;
  __mmask16 rest = static_cast<__mmask16>((1u << (count - i)) - 1);
  __m256bh some = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(rest, from + i));
  __builtin_memcpy(to + i, &some, sizeof(uint16_t) * (count - i));
}

// Words of two rows of bfloat16 (`second` may be null: zeros).
inline void pair_up(const uint16_t* first, const uint16_t* second, int64_t count, float* words) {
  typedef uint32_t Word __attribute__((may_alias));
  Word* to = reinterpret_cast<Word*>(words);
  if (second == nullptr)
    for (int64_t i = 0; i < count; ++i) to[i] = first[i];
  else
    for (int64_t i = 0; i < count; ++i) to[i] = first[i] | static_cast<uint32_t>(second[i]) << 16;
}

struct Halves {
  using In = __m512bh;
  static constexpr int64_t kValues = 2;
  static constexpr float kNegligible = 1.f / 4096;  // an eighth of the largest's own rounding
  static constexpr bool kTiled = false;
  static int64_t whole(int64_t words) { return words; }
  using Held = Floats::Held;
  static In cast(__m512i bits) { return reinterpret_cast<In>(bits); }
  static In panel(const float* words) { return cast(_mm512_loadu_si512(words)); }
  static In row(const float* word) {
    int32_t bits;
    __builtin_memcpy(&bits, word, sizeof bits);
    return cast(_mm512_set1_epi32(bits));
  }
  static Vec mad(In a, In b, Vec c) { return _mm512_dpbf16_ps(c, a, b); }
  static uint32_t size(uint32_t word) {
    uint32_t first = word << 16 & 0x7fff0000u, second = word & 0x7fff0000u;
    return first > second ? first : second;
  }
  // Two rows of floats, one behind the other, become one of words where the first stands.
  static void words(float* rows, int64_t count) {
    for (int64_t i = 0; i < count; i += W) {  // a vector of both rows is read before its words are written
      int64_t some = count - i < W ? count - i : W;
      uint16_t first[W], second[W];
      round_to_bf16(rows + i, some, first);
      round_to_bf16(rows + count + i, some, second);
      pair_up(first, second, some, rows + i);
    }
  }
};
#endif

// sum[r][v] = sum_j a[r][j * step] * u[j * kPanel + v * W], a word each; finish(r, v, sum) gets them.
template <class E, int R, int V, class Finish>
__attribute__((always_inline)) inline void rows_tile(const float* u, const float* const* a, int64_t step,
                                                     int64_t words, Finish finish) {
  const float* row[R];
  for (int r = 0; r < R; ++r) row[r] = a[r];
  Vec sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = splat(0.f);
  for (int64_t j = 0; j < words; ++j) {
    typename E::In b[V];
    for (int v = 0; v < V; ++v) b[v] = E::panel(u + j * kPanel + v * W);
    for (int r = 0; r < R; ++r) {
      typename E::In one = E::row(row[r] + j * step);
      for (int v = 0; v < V; ++v) sum[r][v] = E::mad(one, b[v], sum[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) finish(r, v, sum[r][v]);
}

}  // namespace
