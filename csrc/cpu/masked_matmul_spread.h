// What is kept of rows of the weight, put back where it stands; see masked_matmul.h for `bits`.
#pragma once
#include <cstddef>
#include <cstdint>

#include "cpu/lanes.h"
#include "cpu/masked_matmul_lists.h"

namespace autoflip {
namespace {

// floats of a gradient that no cache will hold until it is read again, and which need not pass through one
// (AVX2: Zen 1, where 2304x512 gains by it only from density 0.5 on and 4096x4096 takes half the time or
// less)
constexpr int64_t kSpreadPast = kVector == 16 ? kPackFrom : kPastCache;

// whether rows of n floats, `stride` apart, can be stored past the cache
AF_INLINE bool whole_lines(const float* to, int64_t n, int64_t stride) {
  return n % kVector == 0 && stride % kVector == 0 && reinterpret_cast<std::uintptr_t>(to) % sizeof(vec) == 0;
}

#if defined(__AVX512F__)
AF_INLINE __m256 expand8(const float* from, unsigned bits) {
  return _mm256_permutex2var_ps(_mm256_loadu_ps(from), ranks_of(bits), __m256{});
}

AF_INLINE vec expand(const float* from, unsigned bits) {
  return _mm512_maskz_expand_ps(__mmask16(bits), load(from));
}

AF_INLINE void store_word(float* to, vec v, bool past) {
  if (past)
    _mm512_stream_ps(to, v);
  else
    store(to, v);
}

// A row on its way past the cache, some words at a time: memory takes its lines while the next row is
// computed.
class Pending {
 public:
  AF_INLINE void start(const float* from, const uint16_t* bits, int64_t n, float* to) {
    from_ = from;
    bits_ = bits;
    to_ = to;
    words_ = n / kVector;
  }
  AF_INLINE void advance(int64_t words) {
    words = words < words_ ? words : words_;
    words_ -= words;
    for (; words > 0; --words, to_ += kVector) {
      _mm512_stream_ps(to_, expand(from_, *bits_));
      from_ += __builtin_popcount(*bits_++);
    }
  }
  AF_INLINE void finish() { advance(words_); }

 private:
  const float* from_ = nullptr;
  const uint16_t* bits_ = nullptr;
  float* to_ = nullptr;
  int64_t words_ = 0;
};
#endif

// to[j] = bit j of `bits` ? the next of `from` : 0; `column`: the numbers of the bits that are set; `empty`:
// n zeros, and zeros again afterwards
AF_INLINE void spread_row(const float* from, const uint16_t* column, int64_t count, const uint16_t* bits,
                          int64_t n, float* to, bool past, float* empty) {
#if defined(__AVX512F__)
  past = past && whole_lines(to, n, 0);
  if (count * 16 > n) {
    int64_t j = 0;
    for (; j + kVector <= n; j += kVector, ++bits) {
      store_word(to + j, expand(from, *bits), past);
      from += __builtin_popcount(*bits);
    }
    if (j < n) _mm512_mask_storeu_ps(to + j, __mmask16((1u << (n - j)) - 1), expand(from, *bits));
    return;
  }
  if (past) {
    for (int64_t j = 0; j < count; ++j) empty[column[j]] = from[j];
    for (int64_t j = 0; j < n; j += kVector) _mm512_stream_ps(to + j, load(empty + j));
    for (int64_t j = 0; j < count; ++j) empty[column[j]] = 0;
    return;
  }
#endif
  (void)bits;
#if defined(__AVX2__) && !defined(__AVX512F__)
  if (past && whole_lines(to, n, 0)) {
    put(from, column, count, empty);
    for (int64_t j = 0; j < n; j += kVector) {
      _mm256_stream_ps(to + j, load(empty + j));
      store(empty + j, vec{});
    }
    return;
  }
#endif
  (void)past;
  (void)empty;
  __builtin_memset(to, 0, std::size_t(n) * sizeof(float));
  put(from, column, count, to);
}

#if defined(__AVX512F__)
// spread_row, into the cache, of two rows side by side that begin at from[0] and from[1]; their bits are
// `words` apart. By tables and permutations: vexpandps takes 5 cycles (Zen 4).
AF_INLINE void spread_pair(const float* const (&from)[2], const uint16_t* bits, int64_t words, int64_t n,
                           float* to, int64_t stride) {
  const float* next[2] = {from[0], from[1]};
  int64_t j = 0;
  for (; j + kVector <= n; j += kVector, ++bits)
    unroll<0, 2>([&](auto r) AF_LAMBDA {
      const unsigned b = bits[r.value * words];
      float* at = to + r.value * stride + j;
      _mm256_storeu_ps(at, expand8(next[r.value], b & 255));
      _mm256_storeu_ps(at + kHalf, expand8(next[r.value] + __builtin_popcount(b & 255), b >> 8));
      next[r.value] += __builtin_popcount(b);
    });
  const __mmask16 some = __mmask16((1u << (n - j)) - 1);
  if (j < n)
    unroll<0, 2>([&](auto r) AF_LAMBDA {
      _mm512_mask_storeu_ps(to + r.value * stride + j, some, expand(next[r.value], bits[r.value * words]));
    });
}
#endif

// spread_row of `rows` rows that keep the same columns
AF_INLINE void spread_rows(const float* from, int64_t from_stride, const uint16_t* column, int64_t count,
                           const uint16_t* bits, int64_t n, float* to, int64_t stride, int64_t rows,
                           bool past, float* empty) {
  int64_t r = 0;
#if defined(__AVX512F__)
  constexpr int kRows = 4;  // share what is found out about a word
  if (count * 16 > n)
    for (; r + kRows <= rows; r += kRows) {
      const bool lines = past && whole_lines(to + r * stride, n, stride);
      const float* next = from + r * from_stride;
      int64_t j = 0;
      const auto words = [&](auto many, __mmask16 some) AF_LAMBDA {  // so many of one row, then of the next
        constexpr int W = decltype(many)::value;
        const __m512i ones = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        __m512i place[W];
        __mmask16 kept[W];
        const float* at[W + 1] = {next};
        unroll<0, W>([&](auto i) AF_LAMBDA {
          kept[i.value] = __mmask16(bits[j / kVector + i.value]);
          place[i.value] = _mm512_maskz_expand_epi32(kept[i.value], ones);
          at[i.value + 1] = at[i.value] + __builtin_popcount(kept[i.value]);
        });
        unroll<0, kRows * W>([&](auto i) AF_LAMBDA {
          constexpr int q = i.value / W, k = i.value % W;
          const vec v = _mm512_maskz_permutexvar_ps(kept[k], place[k], load(at[k] + q * from_stride));
          float* out = to + (r + q) * stride + j + k * kVector;
          if (some == 0xffff)
            store_word(out, v, lines);
          else
            _mm512_mask_storeu_ps(out, some, v);
        });
        next = at[W];
        j += W * kVector;
      };
      // rows a large power of two apart fight for the same few places: 4096 columns took a fifth longer word
      // by word
      if (stride % 1024 == 0)
        while (j + 4 * kVector <= n) words(Int<4>{}, 0xffff);
      while (j + kVector <= n) words(Int<1>{}, 0xffff);
      if (j < n) words(Int<1>{}, __mmask16((1u << (n - j)) - 1));
    }
#endif
  for (; r < rows; ++r)
    spread_row(from + r * from_stride, column, count, bits, n, to + r * stride, past, empty);
}

}  // namespace
}  // namespace autoflip
