// Rice and varint codes of the gaps between kept entries. Included by delta_impl.h only.
#pragma once
#include "cpu/delta_bits.h"
#if defined(__AVX512BW__)
#include "cpu/delta_bytes.h"
#endif

namespace autoflip {
namespace {

constexpr int64_t kGapWords = 32;

// The positions of the set bits of at most kGapWords words, eight at a time: how many a word has is a branch
// that no CPU foresees. Up to seven places behind the last one are written too.
inline int64_t positions(const uint64_t* words, int64_t num_words, uint32_t* out) {
  int64_t found = 0;
  for (int64_t w = 0; w < num_words; ++w) {
    uint64_t word = words[w];
    const int hits = set_bits(word);
    for (int done = 0; done < hits; done += 8)
      for (int i = 0; i < 8; ++i, word &= word - 1)
        out[found + done + i] = uint32_t(64 * w) + uint32_t(__builtin_ctzll(word | 1ULL << 63));
    found += hits;
  }
  return found;
}

template <class Each>
inline void each_gap(const uint64_t* words, int64_t num_words, Each each) {
  uint32_t at[64 * kGapWords + 8];
  int64_t next = 0;  // the position that a gap of zero would mean
  for (int64_t first = 0; first < num_words; first += kGapWords) {
    const int64_t found = positions(words + first, lesser(kGapWords, num_words - first), at);
    if (!found) continue;
    each(uint64_t(64 * first + at[0] - next));
    for (int64_t i = 1; i < found; ++i) each(uint64_t(at[i] - at[i - 1] - 1));
    next = 64 * first + at[found - 1] + 1;
  }
}

int64_t rice_bits(const uint64_t* words, int64_t num_words, int k) {
  int64_t total = 0;
  each_gap(words, num_words, [&](uint64_t gap) {
    const uint64_t ones = gap >> k;
    total += ones < kRiceEscape ? int64_t(ones) + 1 + k : kRiceEscape + 32;
  });
  return total;
}

int64_t rice_encode(const uint64_t* words, int64_t num_words, int k, uint8_t* out) {
  uint64_t hold = 0;
  int filled = 0;
  int64_t at = 0;
  each_gap(words, num_words, [&](uint64_t gap) {
    const uint64_t ones = gap >> k;
    uint64_t code;
    int size;
    if (ones < kRiceEscape) {
      code = ((1ULL << ones) - 1) | (gap & ((1ULL << k) - 1)) << (ones + 1);
      size = int(ones) + 1 + k;
    } else {
      code = ((1ULL << kRiceEscape) - 1) | gap << kRiceEscape;
      size = kRiceEscape + 32;
    }
    hold |= code << filled;
    if (filled + size >= 64) {
      std::memcpy(out + at, &hold, 8);
      at += 8;
      hold = code >> (64 - filled);  // size <= 56, so filled >= 8 here
      filled += size - 64;
    } else {
      filled += size;
    }
  });
  std::memcpy(out + at, &hold, size_t((filled + 7) / 8));
  return at + (filled + 7) / 8;
}

int64_t rice_decode(const uint8_t* data, int64_t bytes, int64_t n, int64_t kept, int k, uint64_t* words) {
  const int64_t end = 8 * bytes;
  const uint64_t low = (1ULL << k) - 1;
  int64_t at = 0, next = 0, j = 0;
  const auto put = [&](uint64_t gap) {
    next += int64_t(gap) + 1;
    words[(next - 1) >> 6] |= 1ULL << ((next - 1) & 63);
  };
  // as many codes as a window of 57 bits or more holds, then the next window
  while (j < kept && (at >> 3) + 8 <= bytes) {
    uint64_t window;
    std::memcpy(&window, data + (at >> 3), 8);
    window >>= at & 7;
    int left = 64 - int(at & 7);
    const int before = left;
    while (j < kept) {
      const int ones = ~window ? __builtin_ctzll(~window) : 64, size = ones + 1 + k;
      if (ones >= kRiceEscape || size > left) break;
      const uint64_t gap = uint64_t(ones) << k | (window >> (ones + 1) & low);
      if (gap >= uint64_t(n - next)) return kRange;
      put(gap);
      window = size < 64 ? window >> size : 0;
      left -= size;
      ++j;
    }
    at += before - left;
    if (left == before) break;  // an escape, or the last bytes: one by one
  }
  for (; j < kept; ++j) {
    const int64_t byte = at >> 3;
    uint64_t window = 0;  // past the end there are zeros
    if (byte + 8 <= bytes)
      std::memcpy(&window, data + byte, 8);
    else if (byte < bytes)
      std::memcpy(&window, data + byte, size_t(bytes - byte));
    window >>= at & 7;
    const int ones = ~window ? __builtin_ctzll(~window) : 64;
    uint64_t gap;
    if (ones < kRiceEscape) {
      gap = uint64_t(ones) << k | (window >> (ones + 1) & low);
      at += ones + 1 + k;
    } else {
      gap = window >> kRiceEscape & 0xFFFFFFFFu;
      at += kRiceEscape + 32;
    }
    if (at > end) return kShort;
    if (gap >= uint64_t(n - next)) return kRange;
    put(gap);
  }
  const int64_t used = (at + 7) >> 3;
  if ((at & 7) && data[used - 1] >> (at & 7)) return kPadding;
  return used;
}

inline uint8_t* put_varint(uint64_t gap, uint8_t* to) {
  for (; gap >= 0x80; gap >>= 7) *to++ = uint8_t(gap | 0x80);
  *to++ = uint8_t(gap);
  return to;
}

int64_t varint_encode(const uint64_t* words, int64_t num_words, int64_t skipped, uint8_t* out) {
#if defined(__AVX512BW__)
  if (expands_bytes()) return varint_words(words, num_words, uint64_t(skipped), out);
#endif
  uint8_t* to = out;
  for (int64_t w = 0; w < num_words; ++w) {
    uint64_t word = words[w];
    if (!word) {
      skipped += 64;
      continue;
    }
    int last = __builtin_ctzll(word);
    const int hits = set_bits(word), end = 63 - __builtin_clzll(word);
    to = put_varint(uint64_t(skipped + last), to);
    // inside a word every gap is a byte; eight at a time as in positions()
    for (int done = 0; done < hits - 1; done += 8)
      for (int i = 0; i < 8; ++i) {
        word &= word - 1;
        const int place = __builtin_ctzll(word | 1ULL << 63);
        to[done + i] = uint8_t(place - last - 1);
        last = place;
      }
    to += hits - 1;
    skipped = 63 - end;
  }
  return to - out;
}

int64_t varint_decode(const uint8_t* data, int64_t bytes, int64_t n, int64_t kept, uint64_t* words) {
  int64_t at = 0, next = 0, last = 0;
  uint64_t held = 0;  // words[last] so far; it is stored with every bit, never loaded
  const auto put = [&](uint64_t gap) {
    const int64_t place = next + int64_t(gap), w = place >> 6;
    held = (w == last ? held : 0) | 1ULL << (place & 63);
    words[last = w] = held;
    next = place + 1;
  };
  for (int64_t j = 0; j < kept;) {
    // eight gaps of a byte each, which cannot leave the tensor
    while (j + 8 <= kept && at + 8 <= bytes && n - next >= 8 * 128) {
      uint64_t eight;
      std::memcpy(&eight, data + at, 8);
      if (eight & 0x8080808080808080ULL) break;
      for (int i = 0; i < 8; ++i) put(eight >> 8 * i & 0x7F);
      at += 8, j += 8;
    }
    for (const int64_t stop = lesser(kept, j + 8); j < stop; ++j) {
      uint64_t gap = 0;
      for (int shift = 0;; shift += 7) {
        if (at == bytes) return kShort;
        const uint8_t byte = data[at++];
        gap |= uint64_t(byte & 0x7F) << shift;
        if (byte < 0x80) {
          if (byte == 0 && shift) return kLong;  // the shortest form only
          break;
        }
        if (shift == 56) return kLong;
      }
      if (gap >= uint64_t(n - next)) return kRange;
      put(gap);
    }
  }
  return at;
}

}  // namespace
}  // namespace autoflip
