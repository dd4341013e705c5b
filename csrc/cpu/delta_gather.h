// Kept entries of a tensor, packed to the left: intrinsics compress in registers and store whole vectors,
// because vpcompressd to memory is microcoded on Zen 4. Included by delta_impl.h only.
#pragma once
#include "common/cpu.h"
#include "cpu/delta_bits.h"
#include "cpu/lanes.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace autoflip {
namespace {

constexpr int64_t kStep = 4096;   // entries at a time: 16 KB, half of the first cache
constexpr int64_t kAhead = 1024;  // a page of them, at whose end prefetchers stop
constexpr int64_t kSlack = 64;    // whole vectors are stored and loaded past the last value

int64_t count(const uint64_t* words, int64_t num_words) {
  int64_t total = 0;
  for (int64_t i = 0; i < num_words; ++i) total += set_bits(words[i]);
  return total;
}

// One word's worth of entries without vectors: also the tail of every tensor.
inline int64_t gather_word(const float* x, const float* base, uint64_t word, int64_t size, uint32_t& bad,
                           float* out) {
  for (int64_t i = 0; i < size; ++i) {
    const float d = base ? x[i] - base[i] : x[i];
    bad |= (bits_of(d) & 0x7F800000u) == 0x7F800000u;
  }
  int64_t rank = 0;
  for (; word; word &= word - 1) {
    const int i = __builtin_ctzll(word);
    out[rank++] = base ? x[i] - base[i] : x[i];
  }
  return rank;
}

// What is not zero is looked for in a step of kStep entries, and then taken, while memory has nothing to do:
// it is asked for the 64 entries a step ahead. Into the second cache: the first one is full.
inline void fetch_step(const float* x) {
  for (int i = 0; i < 64; i += 16) __builtin_prefetch(x + kStep + i, 0, 2);
}

#if defined(__AVX512F__)
// Where every line is not fetched ahead: the first ones of the page behind set its prefetcher going. x - base
// at density 0.1 took 3.1 to 3.3 ms with it and 3.35 to 3.6 without (Zen 4, 10 M entries, memcpy 3.4 ms).
inline void open_page(const float* x) {
  for (int i = 0; i < 64; i += 16) _mm_prefetch(reinterpret_cast<const char*>(x + i + kAhead), _MM_HINT_T1);
}

constexpr int64_t kFewer = 6;  // below one entry of so many, those of a word are picked one by one

// The kept entries of a word one by one, four to a turn: up to three more are stored. In cache 10 M entries
// at density 0.1 take 0.74 ms with it and 1.12 with compress, at 0.2 as long (Zen 4).
template <bool kBase>
inline int64_t pick_64(const float* x, const float* base, uint64_t word, float* out) {
  const int hits = __builtin_popcountll(word);
  for (int done = 0; done < hits; done += 4)
    for (int i = 0; i < 4; ++i, word &= word - 1) {
      const int64_t place = __builtin_ctzll(word | 1ULL << 63);
      out[done + i] = kBase ? x[place] - base[place] : x[place];
    }
  return hits;
}

// One word's 64 entries; kRoom: whole vectors may be stored past the last value; kFew: few are kept; kFind:
// `word` is what is not zero.
template <bool kBase, bool kFetch, bool kRoom, bool kFew, bool kFind = false>
inline int64_t gather_64(const float* x, const float* base, uint64_t& word, __m512& sum, float* out) {
  int64_t rank = 0;
  uint64_t held = word, found = 0;
  for (int i = 0; i < 64; i += 16, held >>= 16) {
    if (kFetch) _mm_prefetch(reinterpret_cast<const char*>(x + i + kAhead), _MM_HINT_T0);
    __m512 d = _mm512_loadu_ps(x + i);
    if (kBase) {
      if (kFetch) _mm_prefetch(reinterpret_cast<const char*>(base + i + kAhead), _MM_HINT_T0);
      d = _mm512_sub_ps(d, _mm512_loadu_ps(base + i));
    }
    // finite * 0 is 0, anything else NaN: one multiply-add where a comparison would wait for compress's port
    sum = _mm512_fmadd_ps(d, _mm512_setzero_ps(), sum);
    const __mmask16 m = kFind ? _mm512_cmp_ps_mask(d, _mm512_setzero_ps(), _CMP_NEQ_UQ) : __mmask16(held);
    if (kFind) found |= uint64_t(m) << i;
    if (kRoom && kFew) continue;
    const int hits = __builtin_popcount(m);
    const __m512 dense = _mm512_maskz_compress_ps(m, d);
    if (kRoom)
      _mm512_storeu_ps(out + rank, dense);
    else
      _mm512_mask_storeu_ps(out + rank, __mmask16((1u << hits) - 1), dense);
    rank += hits;
  }
  if (kFind) word = found;
  return kRoom && kFew ? pick_64<kBase>(x, base, word, out) : rank;
}

template <bool kBase, bool kFetch, bool kFew>
bool gather_vectors(const float* x, const float* base, const uint64_t* words, int64_t n, int64_t kept,
                    float* out) {
  __m512 sum = _mm512_setzero_ps();
  int64_t rank = 0;
  const int64_t full = n / 64;
  for (int64_t w = 0; w < full; ++w) {
    const float *p = x + 64 * w, *q = kBase ? base + 64 * w : nullptr;
    if (!kFetch && w % (kAhead / 64) == 0) {
      open_page(p);
      if (kBase) open_page(q);
    }
    uint64_t word = words[w];
    if (rank + 64 <= kept)
      rank += gather_64<kBase, kFetch, true, kFew>(p, q, word, sum, out + rank);
    else
      rank += gather_64<kBase, kFetch, false, kFew>(p, q, word, sum, out + rank);
  }
  uint32_t tail = _mm512_cmp_ps_mask(sum, sum, _CMP_UNORD_Q) != 0;
  if (n % 64)
    gather_word(x + 64 * full, kBase ? base + 64 * full : nullptr, words[full], n % 64, tail, out + rank);
  return tail;
}

template <bool kFew>
bool gather_as(const float* x, const float* base, const uint64_t* words, int64_t n, int64_t kept,
               float* out) {
  if (fetches_ahead())
    return base ? gather_vectors<true, true, kFew>(x, base, words, n, kept, out)
                : gather_vectors<false, true, kFew>(x, base, words, n, kept, out);
  return base ? gather_vectors<true, false, kFew>(x, base, words, n, kept, out)
              : gather_vectors<false, false, kFew>(x, base, words, n, kept, out);
}

template <bool kCheck = true>  // which costs nothing here
bool gather_once(const float* x, const float* base, const uint64_t* words, int64_t n, int64_t kept,
                 float* out) {
  return kFewer * kept < n ? gather_as<true>(x, base, words, n, kept, out)
                           : gather_as<false>(x, base, words, n, kept, out);
}

template <bool kFetch>
bool gather_nonzero_as(const float* x, int64_t n, uint64_t* words, int64_t& kept, float* out) {
  __m512 sum = _mm512_setzero_ps();
  kept = 0;
  for (int64_t w = 0; w < n / 64; ++w) {
    if (!kFetch && w % (kAhead / 64) == 0) open_page(x + 64 * w);
    kept += gather_64<false, kFetch, true, false, true>(x + 64 * w, nullptr, words[w], sum, out + kept);
  }
  return _mm512_cmp_ps_mask(sum, sum, _CMP_UNORD_Q) != 0;
}

// What is not zero of n entries, a multiple of 64, and where that is; `out` has room for n.
bool gather_nonzero(const float* x, int64_t n, uint64_t* words, int64_t& kept, float* out) {
  return fetches_ahead() ? gather_nonzero_as<true>(x, n, words, kept, out)
                         : gather_nonzero_as<false>(x, n, words, kept, out);
}
#elif defined(__AVX2__)
// kCheck: tells of NaN and infinity.
template <bool kCheck = true>
bool gather_once(const float* x, const float* base, const uint64_t* words, int64_t n, int64_t kept,
                 float* out) {
  const __m256i exponent = _mm256_set1_epi32(0x7F800000);
  __m256i bad = _mm256_setzero_si256();
  int64_t rank = 0;
  const int64_t full = n / 64;
  for (int64_t w = 0; w < full; ++w) {
    uint64_t word = words[w];
    if (!kCheck) fetch_step(x + 64 * w);
    for (int i = 0; i < 8; ++i, word >>= 8) {
      __m256 d = _mm256_loadu_ps(x + 64 * w + 8 * i);
      if (base) d = _mm256_sub_ps(d, _mm256_loadu_ps(base + 64 * w + 8 * i));
      if (kCheck) {
        const __m256i field = _mm256_and_si256(_mm256_castps_si256(d), exponent);
        bad = _mm256_or_si256(bad, _mm256_cmpeq_epi32(field, exponent));
      }
      uint32_t m = uint32_t(word & 0xFF);
      if (rank + 8 <= kept) {
        _mm256_storeu_ps(out + rank, _mm256_permutevar8x32_ps(d, lanes_of(m)));
        rank += __builtin_popcount(m);
      } else {
        float lanes[8];
        _mm256_storeu_ps(lanes, d);
        for (; m; m &= m - 1) out[rank++] = lanes[__builtin_ctz(m)];
      }
    }
  }
  uint32_t tail = !_mm256_testz_si256(bad, bad);
  if (n % 64)
    gather_word(x + 64 * full, base ? base + 64 * full : nullptr, words[full], n % 64, tail, out + rank);
  return tail;
}
#else
// kCheck: tells of NaN and infinity.
template <bool kCheck = true>
bool gather_once(const float* x, const float* base, const uint64_t* words, int64_t n, int64_t kept,
                 float* out) {
  uint32_t bad = 0;
  int64_t rank = 0;
  for (int64_t start = 0; start < n; start += 64) {
    const float *p = x + start, *q = base ? base + start : nullptr;
    uint64_t word = words[start / 64];
    if (!kCheck) fetch_step(p);
    if (n - start < 64 || rank + 64 > kept || base) {
      rank += gather_word(p, q, word, lesser(64, n - start), bad, out + rank);
      continue;
    }
    if (kCheck)
      for (int i = 0; i < 64; ++i) bad |= (bits_of(p[i]) & 0x7F800000u) == 0x7F800000u;
    // eight at a time: how many a word has is a branch that no CPU foresees
    const int hits = set_bits(word);
    for (int done = 0; done < hits; done += 8)
      for (int i = 0; i < 8; ++i, word &= word - 1)
        out[rank + done + i] = p[__builtin_ctzll(word | 1ULL << 63)];
    rank += hits;
  }
  return bad;
}
#endif

// Whole lines around the caches: a store into a line that no cache holds reads it first. `out` is 64-byte
// aligned.
inline void stream_lines(const float* from, int64_t n, float* out) {
#if defined(__AVX512F__)
  for (int64_t i = 0; i < n; i += 16) _mm512_stream_ps(out + i, _mm512_loadu_ps(from + i));
#elif defined(__AVX2__)
  for (int64_t i = 0; i < n; i += 8) _mm256_stream_ps(out + i, _mm256_loadu_ps(from + i));
#else
  std::memcpy(out, from, size_t(n) * 4);
#endif
}

// At low density vectors overlap where they are stored: into lines that the first cache holds that costs
// nothing, into far ones a quarter of the time. nt: whole lines go around the caches.
bool gather(const float* x, const float* base, const uint64_t* words, int64_t n, int64_t kept, bool nt,
            float* out) {
  if (n <= kStep || (!nt && 4 * kept > n)) return gather_once(x, base, words, n, kept, out);
  constexpr int64_t kLine = 16;
  alignas(64) float panel[kLine + kStep + kSlack];
  int64_t held = 0, head = nt ? -int64_t(uintptr_t(out) / 4) & (kLine - 1) : 0;  // what is left of a line
  bool bad = false;
  for (int64_t start = 0; start < n; start += kStep) {
    const int64_t size = lesser(kStep, n - start), fresh = count(words + start / 64, (size + 63) / 64);
    bad |= gather_once(x + start, base ? base + start : nullptr, words + start / 64, size, fresh + kSlack,
                       panel + held);
    held += fresh;
    const int64_t before = lesser(head, held), lines = nt ? (held - before) & -kLine : 0;
    std::memcpy(out, panel, size_t(nt ? before : held) * 4);
    if (nt) {
      stream_lines(panel + before, lines, out + before);
      out += before + lines;
      head -= before;
      held -= before + lines;
      std::memmove(panel, panel + before + lines, size_t(held) * 4);
    } else {
      out += held;
      held = 0;
    }
  }
  std::memcpy(out, panel, size_t(held) * 4);
#if defined(__AVX2__)
  if (nt) _mm_sfence();
#endif
  return bad;
}

}  // namespace
}  // namespace autoflip
