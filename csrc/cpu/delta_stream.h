// From (x, base) to coded values and back in one pass: floats live in a cache-sized scratch only.
// Included by delta_impl.h, after gather and expand.
#pragma once
#include <algorithm>

#include "cpu/delta_bits.h"
#include "cpu/delta_values.h"
#if defined(__AVX512BW__)
#include "cpu/delta_bytes.h"
#endif

namespace autoflip {
namespace {

struct Scratch {
  alignas(64) float values[kStep + kDeltaBlock + kSlack];
};

bool not_finite(const float* x, int64_t n) {
  uint32_t bad = 0;
  for (int64_t i = 0; i < n; ++i) bad |= (bits_of(x[i]) & 0x7F800000u) == 0x7F800000u;
  return bad;
}

// out = x - base, every entry; returns whether one is NaN or infinite
bool take(const float* x, const float* base, int64_t n, float* out) {
  if (base)
    for (int64_t i = 0; i < n; ++i) out[i] = x[i] - base[i];
  else
    std::memcpy(out, x, size_t(n) * 4);
  return not_finite(out, n);
}

void pack_nibbles(const int8_t* codes, int64_t n, uint8_t* out) {
  for (int64_t i = 0; i < n / 2; ++i) out[i] = uint8_t((codes[2 * i] & 15) | uint8_t(codes[2 * i + 1]) << 4);
  if (n % 2) out[n / 2] = codes[n - 1] & 15;
}

void unpack_nibbles(const uint8_t* pairs, int64_t n, int8_t* codes) {  // writes one more where n is odd
  for (int64_t i = 0; i < (n + 1) / 2; ++i) {
    codes[2 * i] = int8_t(int8_t(pairs[i] << 4) >> 4);
    codes[2 * i + 1] = int8_t(int8_t(pairs[i]) >> 4);
  }
}

// Values of ranks first.. (a multiple of 256 for codes with scales) into their places in the streams.
void code_values(const float* values, int64_t n, int64_t first, const DeltaCoding& c, Ahead ahead) {
  if (c.kind == kFp32) {
    for (int b = 0; b < 4; ++b) {
      uint8_t* plane = c.streams[b] + first;
      for (int64_t i = 0; i < n; ++i) plane[i] = uint8_t(bits_of(values[i]) >> 8 * b);
    }
  } else if (c.kind == kBf16) {
    round_bf16_planes(values, n, c.key, first, c.streams[0] + first, c.streams[1] + first);
  } else if (c.kind == kInt8) {
    quantise(values, n, c.levels, c.largest, c.key, first, reinterpret_cast<int8_t*>(c.streams[0]) + first,
             c.scales + first / kDeltaBlock, ahead);
  } else {
    int8_t codes[kStep + kDeltaBlock];
    quantise(values, n, c.levels, c.largest, c.key, first, codes, c.scales + first / kDeltaBlock, ahead);
    pack_nibbles(codes, n, c.streams[0] + first / 2);
  }
}

void code_values(const float* values, int64_t n, int64_t first, const DeltaCoding& c) {
  code_values(values, n, first, c, {});
}

// Of the next step, behind what this one asked for itself. x - base as int8 took 0.84 of the time at density
// 0.5 (Emerald Rapids); narrower vectors compute longer, and ask for what is not zero in steps of their own.
Ahead ahead_of(const float* x, const float* base, int64_t left) {
#if defined(__AVX512F__)
  const bool asks = fetches_ahead();
#else
  const bool asks = false;
#endif
  const int64_t skipped = kStep + kAhead;
  if (!asks || left <= skipped) return {};
  return {x + skipped, base ? base + skipped : nullptr, lesser(kStep - kAhead, left - skipped)};
}

bool encode(const float* x, const float* base, const uint64_t* words, int64_t n, int64_t rank,
            const DeltaCoding& c, float* loose, uint64_t* found) {
  Scratch s;
  const bool blocks = c.kind == kInt8 || c.kind == kInt4;
  int64_t held = 0, head = blocks ? -rank & (kDeltaBlock - 1) : 0;
  bool bad = false;
  for (int64_t start = 0; start < n; start += kStep) {
    const int64_t size = lesser(kStep, n - start);
    const float* from = base ? base + start : nullptr;
    int64_t fresh = size;
#if defined(__AVX512F__)
    if (found && size % 64 == 0) {
      bad |= gather_nonzero(x + start, size, found + start / 64, fresh, s.values + held);
    } else
#endif
        if (found) {  // what it reads stays in the first cache
      pack_nonzero(x + start, size, found + start / 64);
      fresh = count(found + start / 64, (size + 63) / 64);
      gather_once<false>(x + start, nullptr, found + start / 64, size, fresh + kSlack, s.values + held);
      bad |= not_finite(s.values + held, fresh);  // zeros are
    } else if (words) {
      fresh = count(words + start / 64, (size + 63) / 64);
      bad |= gather_once(x + start, from, words + start / 64, size, fresh + kSlack, s.values + held);
    } else {
      bad |= take(x + start, from, size, s.values + held);
    }
    if (bad) return true;  // NaN has no code, and nobody will read these streams
    held += fresh;
    int64_t done = 0;
    if (head) {  // values before the first whole block of this range
      done = lesser(head, held);
      std::memcpy(loose, s.values, size_t(done) * 4);
      loose += done;
      head -= done;
      rank += done;
    }
    const int64_t ready = blocks ? (held - done) & -kDeltaBlock : held - done;
    code_values(s.values + done, ready, rank, c, ahead_of(x + start, from, n - start));
    rank += ready;
    held -= done + ready;
    std::memmove(s.values, s.values + done + ready, size_t(held) * 4);
  }
  std::memcpy(loose, s.values, size_t(held) * 4);  // and those after the last one
  return false;
}

void value_planes(const DeltaCoding& c, int64_t first, int64_t n, float* out) {
  if (c.kind == kFp32) {
    const uint8_t *p0 = c.streams[0] + first, *p1 = c.streams[1] + first, *p2 = c.streams[2] + first,
                  *p3 = c.streams[3] + first;
    for (int64_t i = 0; i < n; ++i)
      out[i] = float_of(p0[i] | uint32_t(p1[i]) << 8 | uint32_t(p2[i]) << 16 | uint32_t(p3[i]) << 24);
    return;
  }
  const uint8_t *low = c.streams[0] + first, *high = c.streams[1] + first;
  for (int64_t i = 0; i < n; ++i) out[i] = float_of(uint32_t(low[i]) << 16 | uint32_t(high[i]) << 24);
}

// out = values of ranks first..first + n
void decode_values(const DeltaCoding& c, int64_t first, int64_t n, float* out) {
  if (c.kind == kFp32 || c.kind == kBf16) return value_planes(c, first, n, out);
  int64_t block = first / kDeltaBlock;
  if (c.starts) block = std::upper_bound(c.starts, c.starts + c.blocks, first) - c.starts - 1;
  for (int64_t at = first; at < first + n; ++block) {
    const int64_t end = c.starts ? c.starts[block + 1] : (block + 1) * kDeltaBlock;
    const int64_t size = lesser(end, first + n) - at;
    const float scale = c.scales[block];
    float* to = out + (at - first);
    if (c.kind == kInt8) {
      const int8_t* codes = reinterpret_cast<const int8_t*>(c.streams[0]) + at;
      for (int64_t i = 0; i < size; ++i) to[i] = float(codes[i]) * scale;
    } else {
      int8_t codes[kDeltaBlock + 2];
      const int64_t odd = at % 2;
      unpack_nibbles(c.streams[0] + at / 2, size + odd, codes);
      for (int64_t i = 0; i < size; ++i) to[i] = float(codes[i + odd]) * scale;
    }
    at += size;
  }
}

template <bool kAdd>
void decode_any(const DeltaCoding& c, const uint64_t* words, int64_t n, int64_t rank, float weight, bool nt,
                float* out) {
  Scratch s;
  int64_t start = 0;
#if defined(__AVX512BW__)
  if (c.kind == kInt8 && words && !c.starts && expands_bytes()) {
    rank = expand_codes<kAdd>(c, words, n / 64, rank, weight, nt, out);
    start = n / 64 * 64;
  }
#endif
  for (; start < n; start += kStep) {
    const int64_t size = lesser(kStep, n - start);
    float* to = out + start;
    const int64_t kept = words ? count(words + start / 64, (size + 63) / 64) : size;
    if (!words && !kAdd) {
      decode_values(c, rank, kept, to);
    } else {
      decode_values(c, rank, kept, s.values);
      if (words)
        expand_any<kAdd>(s.values, words + start / 64, size, kept + kSlack, weight, nt, to);
      else
        for (int64_t i = 0; i < size; ++i) to[i] += weight * s.values[i];
    }
    rank += kept;
  }
#if defined(__SSE2__)
  if (nt) _mm_sfence();  // once: a fence for every step took a quarter of the time
#endif
}

void decode(const DeltaCoding& c, const uint64_t* words, int64_t n, int64_t rank, bool nt, float* out) {
  decode_any<false>(c, words, n, rank, 1.0f, nt, out);
}

void decode_add(const DeltaCoding& c, const uint64_t* words, int64_t n, int64_t rank, float weight,
                float* out) {
  decode_any<true>(c, words, n, rank, weight, false, out);
}

int64_t drop_zeros(int kind, uint8_t* codes, int64_t n, uint64_t* words, uint8_t* counts) {
  int64_t kept = 0;
  for (int64_t first = 0; first < n; first += kDeltaBlock) {
    const int64_t size = lesser(kDeltaBlock, n - first);
    int8_t block[kDeltaBlock], left[kDeltaBlock];
    uint8_t stays[kDeltaBlock];
    if (kind == kInt8)
      std::memcpy(block, codes + first, size_t(size));
    else
      unpack_nibbles(codes + first / 2, size, block);
    for (int64_t i = 0; i < size; ++i) stays[i] = block[i] != 0;
    int64_t count = 0;
    for (int64_t i = 0; i < size; ++i) {
      left[count] = block[i];
      count += stays[i];
    }
    if (!count) stays[0] = 1, left[0] = 0, count = 1;
    pack(stays, size, words + first / 64);
    counts[first / kDeltaBlock] = uint8_t(count - 1);
    if (kind == kInt8) {
      std::memcpy(codes + kept, left, size_t(count));
    } else {
      const int64_t odd = kept % 2;  // the first one fills a byte up
      if (odd) codes[kept / 2] = uint8_t(codes[kept / 2] | uint8_t(left[0]) << 4);
      pack_nibbles(left + odd, count - odd, codes + (kept + 1) / 2);
    }
    kept += count;
  }
  return kept;
}

// Whether hostile streams hold only what encode writes: finite values, codes within +-levels. Bytes
// throughout, so that a vector holds as many of them as it can.
bool valid(const DeltaCoding& c, int64_t n) {
  uint8_t bad = 0;
  if (c.kind == kFp32 || c.kind == kBf16) {
    const uint8_t *high = c.streams[c.kind == kFp32 ? 3 : 1], *low = c.streams[c.kind == kFp32 ? 2 : 0];
    for (int64_t i = 0; i < n; ++i) bad |= uint8_t(uint8_t((high[i] & 0x7F) == 0x7F) & low[i] >> 7);
  } else if (c.kind == kInt8) {
    const uint8_t* codes = c.streams[0];
    for (int64_t i = 0; i < n; ++i) bad |= uint8_t(codes[i] == 0x80);
  } else {
    const uint8_t* pairs = c.streams[0];
    for (int64_t i = 0; i < (n + 1) / 2; ++i)
      bad |= uint8_t((pairs[i] & 15) == 8) | uint8_t((pairs[i] & 0xF0) == 0x80);
    if (n % 2) bad |= uint8_t(pairs[n / 2] >> 4 != 0);
  }
  return !bad;
}

}  // namespace
}  // namespace autoflip
