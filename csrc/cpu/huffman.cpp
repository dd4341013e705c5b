#include "cpu/huffman.h"

#include <cmath>

#include "common/cpu.h"
#include "cpu/huffman_table.h"

namespace autoflip {
namespace {

constexpr int64_t kBlock = 1 << 17;  // bytes of a block, at most
constexpr int64_t kQuarter = kBlock / 4;
constexpr int64_t kFrameHead = 14, kBlockHead = 3;
enum BlockKind : uint64_t { kPlain, kOne, kCoded };  // as it is; one byte again and again; by a table
constexpr float kTableBits = 8 * 100;                // about what a table takes

int64_t blocks_of(int64_t n) { return (n + kBlock - 1) / kBlock; }

struct Block {
  const uint8_t* raw;
  int64_t n, size[4];                               // bytes of the four streams
  std::array<std::array<uint32_t, 256>, 4> counts;  // of each stream
  int table = 0;
  BlockKind kind = kCoded;
  bool fresh = false;                   // whether it brings its table
  int64_t coded[4], bytes = 0, at = 0;  // bytes of each stream, of the block; where it begins in the frame

  HuffmanCounts all() const {
    HuffmanCounts sum{};
    for (const auto& c : counts)
      for (size_t s = 0; s < 256; ++s) sum[s] += c[s];
    return sum;
  }
};

// Four streams in turn: the same byte twice in a row would wait for its count to be stored.
void count(Block& b) {
  for (int i = 0; i < 4; ++i) b.size[i] = i < 3 ? (b.n + 3) / 4 : b.n - 3 * b.size[0];
  for (auto& c : b.counts) c.fill(0);
  const uint8_t* from[4];
  for (int i = 0; i < 4; ++i) from[i] = b.raw + i * b.size[0];
  int64_t at = 0;
  for (; at + 8 <= b.size[3]; at += 8) {
    uint64_t eight[4];
    for (int i = 0; i < 4; ++i) std::memcpy(&eight[i], from[i] + at, 8);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j)
#pragma GCC unroll 4
      for (size_t i = 0; i < 4; ++i) ++b.counts[i][uint8_t(eight[i] >> 8 * j)];
  }
  for (size_t i = 0; i < 4; ++i)
    for (int64_t j = at; j < b.size[i]; ++j) ++b.counts[i][from[i][j]];
}

// Bits that an own table takes for these counts: no symbol gets less than 2^-11 of its codes.
float bits_of(const HuffmanCounts& counts) {
  float total = 0, share = 0, bits = 0;
  for (uint32_t c : counts) total += float(c);
  const float least = total / (1 << kLongest);
  for (uint32_t c : counts)
    if (c) {
      const float held = std::max(float(c), least);
      share += held, bits -= float(c) * std::log2(held);
    }
  return share > 0 ? bits + total * std::log2(share) : 0;
}

struct Table {
  HuffmanLengths lengths{};
  HuffmanCodes codes;
  uint8_t head[512];
  int head_bytes = 0;
};

// Blocks in a row share a table until one of them is better off with its own.
std::vector<HuffmanCounts> share_tables(std::vector<Block>& blocks) {
  std::vector<HuffmanCounts> tables;
  float held = 0;
  for (Block& b : blocks) {
    const HuffmanCounts mine = b.all();
    const float alone = bits_of(mine);
    b.fresh = true;
    if (!tables.empty()) {
      HuffmanCounts both = tables.back();
      for (size_t s = 0; s < 256; ++s) both[s] += mine[s];
      const float together = bits_of(both);
      if (together - held <= alone + kTableBits) {
        b.fresh = false;
        tables.back() = both, held = together;
      }
    }
    if (b.fresh) tables.push_back(mine), held = alone;
    b.table = int(tables.size()) - 1;
  }
  return tables;
}

// Kind and sizes of a block and its streams; `pending`: the table did not come with the block it was for.
void measure(Block& b, const Table& table, bool& pending) {
  pending |= b.fresh;
  int64_t total = 0;
  for (size_t i = 0; i < 4; ++i) {
    int64_t bits = 1;  // that marks the end
    for (size_t s = 0; s < 256; ++s) bits += int64_t(b.counts[i][s]) * table.lengths[s];
    total += b.coded[i] = (bits + 7) / 8;
  }
  b.fresh = pending;
  b.bytes = (b.n < 1 << 14 ? 4 : 5) + (b.fresh ? table.head_bytes : 0) + 6 + total + 1;
  const HuffmanCounts all = b.all();
  if (std::count(all.begin(), all.end(), 0u) == 255)
    b.kind = kOne, b.bytes = 1;
  else if (!table.head_bytes || b.bytes >= b.n)
    b.kind = kPlain, b.bytes = b.n;
  else
    pending = false;
}

// Behind each other and from the last byte to the first, without vectors.
void streams(const uint8_t* raw, const int64_t* size, const HuffmanCodes& codes, uint8_t* const* to) {
  for (int i = 0; i < 4; raw += size[i++]) {
    BackwardBits out{to[i]};
    int64_t at = size[i];
    for (; at >= 4; at -= 4) {
      uint64_t four = 0;
      int bits = 0;
#pragma GCC unroll 4
      for (int j = 1; j <= 4; ++j) {
        const uint32_t c = codes[raw[at - j]];
        four |= uint64_t(c & 0xFFFF) << bits;
        bits += int(c >> 16);
      }
      out.put(four, bits);
    }
    for (; at; --at) out.put(codes[raw[at - 1]] & 0xFFFF, int(codes[raw[at - 1]] >> 16));
    out.finish();
  }
}

void write_block(const Block& b, const Table& table, bool last, uint8_t* to) {
  const auto put = [&](uint64_t value, size_t bytes) {
    std::memcpy(to, &value, bytes);
    to += bytes;
  };
  put(uint64_t(last) | b.kind << 1 | uint64_t(b.kind == kOne ? b.n : b.bytes) << 3, kBlockHead);
  if (b.kind != kCoded) {
    std::memcpy(to, b.raw, size_t(b.bytes));
    return;
  }
  const uint64_t kind = b.fresh ? 2 : 3;  // with a table, or the one before
  const int64_t head = b.fresh ? table.head_bytes : 0;
  const uint64_t literals = uint64_t(head + 6 + b.coded[0] + b.coded[1] + b.coded[2] + b.coded[3]);
  if (b.n < 1 << 14)
    put(kind | 2 << 2 | uint64_t(b.n) << 4 | literals << 18, 4);
  else
    put(kind | 3 << 2 | uint64_t(b.n) << 4 | literals << 22, 5);
  std::memcpy(to, table.head, size_t(head));
  to += head;
  for (int i = 0; i < 3; ++i) put(uint64_t(b.coded[i]), 2);
  // whole words are written, so each stream has its own place at first
  constexpr int64_t kRoom = kQuarter * kLongest / 8 + 64;
  static thread_local uint8_t room[4 * kRoom];
  uint8_t* const places[4] = {room, room + kRoom, room + 2 * kRoom, room + 3 * kRoom};
#if defined(__x86_64__)
  if (cpu_isa() == Isa::avx512 && expands_bytes())
    huffman_streams(b.raw, b.size, table.codes, places);
  else
#endif
    streams(b.raw, b.size, table.codes, places);
  for (int i = 0; i < 4; to += b.coded[i++]) std::memcpy(to, places[i], size_t(b.coded[i]));
  *to = 0;  // no sequences
}

}  // namespace

int64_t huffman_bound(int64_t n) { return n + kBlockHead * blocks_of(n) + kFrameHead; }

int64_t huffman_encode(const uint8_t* raw, int64_t n, int64_t limit, int threads, uint8_t* out) {
  const int64_t number = blocks_of(n), each = (n + number - 1) / number;
  std::vector<Block> blocks(static_cast<size_t>(number));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t i = 0; i < number; ++i) {
    Block& b = blocks[size_t(i)];
    b.raw = raw + i * each;
    b.n = i + 1 < number ? each : n - i * each;
    count(b);
  }
  std::vector<Table> tables;
  for (const HuffmanCounts& counts : share_tables(blocks)) {
    tables.push_back({});
    Table& t = tables.back();
    if (std::count(counts.begin(), counts.end(), 0u) == 255) continue;  // blocks of one symbol
    t.lengths = code_lengths(counts);
    codes_of(t.lengths, t.codes);
    t.head_bytes = write_table(t.lengths, t.head);
  }
  // no window: nothing repeats, so that of a block will do; content size of 2, 4 or 8 bytes
  uint8_t head[kFrameHead] = {0x28, 0xB5, 0x2F, 0xFD, 0, (17 - 10) << 3};
  const int wide = n < 256 + (1 << 16) ? 1 : n <= int64_t(UINT32_MAX) ? 2 : 3;
  head[4] = uint8_t(wide << 6);
  const uint64_t content = wide == 1 ? uint64_t(n - 256) : uint64_t(n);
  std::memcpy(head + 6, &content, size_t(1) << wide);
  int64_t total = 6 + (1 << wide);
  bool pending = false;
  for (Block& b : blocks) {
    measure(b, tables[size_t(b.table)], pending);
    b.at = total;
    total += kBlockHead + b.bytes;
  }
  if (total >= limit) return -total;
  std::memcpy(out, head, size_t(blocks[0].at));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t i = 0; i < number; ++i) {
    const Block& b = blocks[size_t(i)];
    write_block(b, tables[size_t(b.table)], i + 1 == number, out + b.at);
  }
  return total;
}

}  // namespace autoflip
