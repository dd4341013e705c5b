// The other way, from bytes of anyone: a frame that differs in anything from what huffman_encode writes is
// left to zstd.
#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "common/cpu.h"
#include "cpu/huffman.h"
#include "cpu/huffman_read.h"

namespace autoflip {
namespace {

constexpr int64_t kBlock = 1 << 17;
constexpr int kPerLoad = 5;  // codes that eight bytes hold, less what is left of the last one

struct Part {
  const uint8_t* from;
  int64_t bytes, n;  // stored, and decoded
  uint8_t* to;
  int kind, table;  // 0: as it is, 1: one byte again and again, 2: coded
};

struct Stream {
  const uint8_t* from;
  int64_t bytes, pos;  // bits not yet read
  uint8_t *to, *end;
};

// A block's four streams, and the codes of their table.
struct Four {
  Stream of[4];
  uint16_t slots[kSlots];
  int64_t most() const { return of[3].end - of[3].to - kPerLoad; }  // the last one is the shortest
};

// As many codes of each stream as a load of eight bytes holds for sure, to `at` behind where the streams are
// written. A set bit behind those that are loaded moves up with them, and tells how many were read.
template <int kStreams>
__attribute__((always_inline)) inline void codes_of_load(const uint8_t* const* from, uint8_t* const* to,
                                                         const uint16_t* const* slots, int64_t at,
                                                         int64_t* pos) {
  uint64_t window[kStreams];
#pragma GCC unroll 8
  for (int i = 0; i < kStreams; ++i) {
    std::memcpy(&window[i], from[i] + (pos[i] >> 3) - 7, 8);
    window[i] = (window[i] << (~pos[i] & 7)) * 2 + 1;
  }
  uint64_t below = 64 - kLongest;  // which the compiler is not to know: a shift by a register needs no copy

#pragma GCC unroll 5
  for (int j = 0; j < kPerLoad; ++j) {
#pragma GCC unroll 8
    for (int i = 0; i < kStreams; ++i) {
      const uint32_t slot = slots[i / 4][window[i] >> below];
      window[i] <<= slot & 63;
      to[i][at + j] = uint8_t(slot >> 8);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kStreams; ++i) pos[i] -= __builtin_ctzll(window[i]);
}

// While all streams have eight bytes. Those of two blocks in turn: a code waits for the one before it in its
// stream, and four streams do not fill that time.
template <int kBlocks>
__attribute__((always_inline)) inline void codes_of_loads(Four* const* blocks) {
  const uint8_t* from[4 * kBlocks];
  uint8_t* to[4 * kBlocks];
  const uint16_t* slots[kBlocks];
  int64_t pos[4 * kBlocks], at = 0, most = INT64_MAX;
  for (int b = 0; b < kBlocks; ++b) {
    for (int i = 0; i < 4; ++i) {
      const Stream& s = blocks[b]->of[i];
      from[4 * b + i] = s.from, to[4 * b + i] = s.to, pos[4 * b + i] = s.pos;
    }
    slots[b] = blocks[b]->slots;
    most = std::min(most, blocks[b]->most());
  }
  while (at <= most) {
    // so many loads are there for sure
    const int64_t least = *std::min_element(pos, pos + 4 * kBlocks);
    if (least < 64) break;
    const int64_t end =
        at + kPerLoad * std::min((least - 64) / (kPerLoad * kLongest) + 1, (most - at) / kPerLoad + 1);
    for (; at < end; at += kPerLoad) codes_of_load<4 * kBlocks>(from, to, slots, at, pos);
  }
  for (int b = 0; b < kBlocks; ++b)
    for (int i = 0; i < 4; ++i) blocks[b]->of[i].to += at, blocks[b]->of[i].pos = pos[4 * b + i];
}

template <int kBlocks>
void plain_loads(Four* const* blocks) {
  codes_of_loads<kBlocks>(blocks);
}
#if defined(__x86_64__)
template <int kBlocks>
__attribute__((target("bmi,bmi2"))) void bmi2_loads(Four* const* blocks) {
  codes_of_loads<kBlocks>(blocks);
}
#endif

template <int kBlocks>
void loads(Four* const* blocks) {
#if defined(__x86_64__)
  if (cpu_isa() != Isa::base) return bmi2_loads<kBlocks>(blocks);
#endif
  plain_loads<kBlocks>(blocks);
}

// Returns whether the streams lie within the block.
bool open(const Part& p, const Lengths& lengths, Four& f) {
  fill(lengths, f.slots);
  uint16_t sizes[3];
  std::memcpy(sizes, p.from, 6);
  const int64_t quarter = (p.n + 3) / 4;
  const uint8_t* from = p.from + 6;
  for (int i = 0; i < 4; ++i) {
    Stream& s = f.of[i];
    s.from = from;
    s.bytes = i < 3 ? sizes[i] : p.from + p.bytes - from;
    if (s.bytes < 1 || s.bytes > p.from + p.bytes - from) return false;
    from += s.bytes;
    s.pos = bits_below_mark(s.from, s.bytes);
    s.to = p.to + i * quarter;
    s.end = i < 3 ? s.to + quarter : p.to + p.n;
  }
  return true;
}

bool finish(Four& f) {
  Four* alone[] = {&f};
  loads<1>(alone);
  for (Stream& one : f.of) {
    while (one.to < one.end && one.pos > 0) {
      const uint32_t slot = f.slots[bits_at(one.from, one.bytes, one.pos - kLongest, kLongest)];
      *one.to++ = uint8_t(slot >> 8);
      one.pos -= slot & 255;
    }
    if (one.to != one.end || one.pos) return false;
  }
  return true;
}

// One block, or two of them.
bool decode(const Part* parts, int64_t number, const std::vector<Lengths>& tables) {
  Four f[2];
  int coded = 0;
  for (int64_t i = 0; i < number; ++i) {
    const Part& p = parts[i];
    if (p.kind == 0) std::memcpy(p.to, p.from, size_t(p.n));
    if (p.kind == 1) std::memset(p.to, *p.from, size_t(p.n));
    if (p.kind == 2 && !open(p, tables[size_t(p.table)], f[coded++])) return false;
  }
  if (coded == 2) {
    Four* both[] = {&f[0], &f[1]};
    loads<2>(both);
  }
  for (int i = 0; i < coded; ++i)
    if (!finish(f[i])) return false;
  return true;
}

// Cuts a frame into its blocks; returns whether it is one of ours, as far as can be told without decoding.
bool cut(const uint8_t* data, int64_t bytes, int64_t n, uint8_t* out, std::vector<Part>& parts,
         std::vector<Lengths>& tables) {
  const uint8_t head[4] = {0x28, 0xB5, 0x2F, 0xFD};
  if (bytes < 12 || std::memcmp(data, head, 4) || data[4] & 63 || !data[4] || data[5] != 7 << 3) return false;
  uint64_t content = 0;
  const int wide = data[4] >> 6;
  if (bytes < 10 + (1 << wide)) return false;
  std::memcpy(&content, data + 6, size_t(1) << wide);
  if (content + (wide == 1 ? 256 : 0) != uint64_t(n)) return false;
  const uint8_t *from = data + 6 + (1 << wide), *end = data + bytes;
  int64_t made = 0;
  for (bool last = false; !last;) {
    if (end - from < 4) return false;
    uint32_t block = 0;
    std::memcpy(&block, from, 3);
    from += 3;
    last = block & 1;
    Part p{from, block >> 3, block >> 3, out + made, int(block >> 1 & 3), 0};
    if (p.kind == 1) p.bytes = 1;
    if (p.kind > 2 || p.bytes > end - from) return false;
    from += p.bytes;
    if (p.kind == 2) {
      uint64_t literals = 0;
      const int format = p.from[0] >> 2 & 3, bits = format == 3 ? 18 : 14, size = format == 3 ? 5 : 4;
      if (format < 2 || p.bytes < size + 1 || p.from[p.bytes - 1]) return false;  // no sequences
      std::memcpy(&literals, p.from, size_t(size));
      p.n = int64_t(literals >> 4 & ((1u << bits) - 1));
      if (int64_t(literals >> (4 + bits)) != p.bytes - size - 1) return false;
      p.from += size, p.bytes -= size + 1;
      if ((literals & 3) == 2) {
        tables.push_back({});
        const int64_t used = read_table(p.from, p.bytes, tables.back());
        if (!used) return false;
        p.from += used, p.bytes -= used;
      } else if ((literals & 3) != 3 || tables.empty()) {
        return false;
      }
      p.table = int(tables.size()) - 1;
      if (p.bytes < 10) return false;  // where the streams begin, and one byte of each
    }
    // blocks of a few bytes could ask for more memory than they make
    if (p.n > kBlock || p.n < (last ? 8 : kHuffmanLeast) || p.n > n - made) return false;
    made += p.n;
    parts.push_back(p);
  }
  return from == end && made == n;
}

}  // namespace

bool huffman_decode(const uint8_t* data, int64_t bytes, int64_t n, int threads, uint8_t* out) {
  std::vector<Part> parts;
  std::vector<Lengths> tables;
  if (n < kHuffmanLeast || !cut(data, bytes, n, out, parts, tables)) return false;
  int bad = 0;
  const int64_t number = int64_t(parts.size());
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t i = 0; i < number; i += 2) {
    if (!decode(&parts[size_t(i)], std::min<int64_t>(2, number - i), tables)) {
#pragma omp atomic write
      bad = 1;
    }
  }
  return !bad;
}

}  // namespace autoflip
