#include "cpu/huffman.h"

#include <cmath>

#include "common/cpu.h"
#include "common/scratch.h"
#include "cpu/huffman_table.h"

namespace autoflip {
namespace {

constexpr int64_t kBlock = 127 << 10;  // bytes of a block, at most; zstd allows 128 kB
constexpr int64_t kRoom =
    (kBlock + 3) / 4 * kLongest / 8 + 64;  // a stream's, to which whole words are written
constexpr int64_t kFrameHead = 14, kBlockHead = 3;
enum BlockKind : uint64_t { kPlain, kOne, kCoded };  // as it is; one byte again and again; by a table
constexpr float kTableBits = 8 * 100;                // about what a table takes
constexpr float kGuessBits = 12;  // for each symbol what one that a sample tells seems to save and does not
constexpr int64_t kSampled = 1 << 19, kRun = 1 << 8,
                  kEvery = 8;  // from so many bytes on an eighth makes the tables

// As equal as can be, but no multiple of a page, or nearly so, between the four streams: they would compete
// for the same lines of the first cache, and take half as long again to read.
int64_t block_of(int64_t n) {
  constexpr int64_t kNear = 256, kPage = 4096;
  const int64_t number = (n + kBlock - 1) / kBlock, each = (n + number - 1) / number;
  const int64_t apart = (each + 3) / 4 % kPage;
  return apart >= kNear && apart < kPage - kNear ? each : std::min(each + 8 * kNear, kBlock);
}

int64_t blocks_of(int64_t n) { return (n + block_of(n) - 1) / block_of(n); }

struct Block {
  const uint8_t* raw;
  int64_t n, size[4];  // bytes of the four streams
  HuffmanCounts counts;
  int table = 0;
  BlockKind kind = kCoded;
  bool fresh = false;  // whether it brings its table
  int64_t coded[4] = {}, bytes = 0;
};

int symbols_of(const HuffmanCounts& counts) {
  return 256 - int(std::count(counts.begin(), counts.end(), 0u));
}

// In four sets for stretches in turn: the same byte twice in a row would wait for its count to be stored.
struct Apart {
  uint32_t of[4][256] = {};
  void add(const uint8_t* raw, int64_t n) {
    const uint8_t* from[4];
    for (int i = 0; i < 4; ++i) from[i] = raw + i * (n / 4);
    int64_t at = 0;
    for (; at + 8 <= n / 4; at += 8) {
      uint64_t eight[4];
      for (int i = 0; i < 4; ++i) std::memcpy(&eight[i], from[i] + at, 8);
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) ++of[i][uint8_t(eight[i] >> 8 * j)];
    }
    for (; at < n / 4; ++at)
      for (int i = 0; i < 4; ++i) ++of[i][from[i][at]];
    for (at = n / 4 * 4; at < n; ++at) ++of[0][raw[at]];
  }
  HuffmanCounts sum(uint32_t times) const {
    HuffmanCounts total;
    for (size_t s = 0; s < 256; ++s) total[s] = times * (of[0][s] + of[1][s] + of[2][s] + of[3][s]);
    return total;
  }
};

void count(Block& b, bool sample) {
  for (int i = 0; i < 4; ++i) b.size[i] = i < 3 ? (b.n + 3) / 4 : b.n - 3 * b.size[0];
  if (b.n == 1 || !std::memcmp(b.raw, b.raw + 1, size_t(b.n) - 1)) b.kind = kOne;
  Apart counted;
  if (!sample || b.kind == kOne) {
    counted.add(b.raw, b.n);
    b.counts = counted.sum(1);
    return;
  }
  for (int64_t at = 0; at + kRun <= b.n; at += kEvery * kRun) counted.add(b.raw + at, kRun);
  b.counts = counted.sum(uint32_t(kEvery));
  uint8_t there[256];
  for (size_t s = 0; s < 256; ++s) there[s] = b.counts[s] > 0;
#if defined(__x86_64__)
  if (cpu_isa() == Isa::avx512 && expands_bytes())
    huffman_present(b.raw, b.n, there);
  else
#endif
    for (int64_t i = 0; i < b.n; ++i) there[b.raw[i]] = 1;
  for (size_t s = 0; s < 256; ++s) b.counts[s] = std::max<uint32_t>(b.counts[s], there[s]);
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
std::vector<HuffmanCounts> share_tables(std::vector<Block>& blocks, bool sampled) {
  std::vector<HuffmanCounts> tables;
  float held = 0;
  for (Block& b : blocks) {
    const HuffmanCounts& mine = b.counts;
    const float alone = bits_of(mine);
    b.fresh = true;
    if (!tables.empty()) {
      HuffmanCounts both = tables.back();
      for (size_t s = 0; s < 256; ++s) both[s] += mine[s];
      const float together = bits_of(both);
      const float guess = sampled ? kGuessBits * float(symbols_of(mine)) : 0;
      if (together - held <= alone + kTableBits + guess) {
        b.fresh = false;
        tables.back() = both, held = together;
      }
    }
    if (b.fresh) tables.push_back(mine), held = alone;
    b.table = int(tables.size()) - 1;
  }
  return tables;
}

// Bytes of a block that is coded, but for its table and streams.
int64_t frame_of(const Block& b) { return (b.n < 1 << 14 ? 4 : 5) + 6 + 1; }

// What its counts tell that it takes, coded, without its table.
int64_t expected(const Block& b, const Table& table) {
  if (b.kind == kOne) return 1;
  if (!table.head_bytes) return b.n;
  int64_t bits = 0, counted = 0;
  for (size_t s = 0; s < 256; ++s) {
    bits += int64_t(b.counts[s]) * table.lengths[s];
    counted += b.counts[s];
  }
  if (counted != b.n) bits = int64_t(double(bits) * double(b.n) / double(counted));
  return frame_of(b) + (bits + 4 + 7) / 8;  // four that mark the streams' ends
}

// Behind each other and from the last byte to the first, without vectors; each into its own `to`, which moves
// on.
void streams(const uint8_t* raw, const int64_t* size, const HuffmanCodes& codes, uint8_t** to) {
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
    to[i] = out.to;
  }
}

void code(Block& b, const Table& table, uint8_t* room) {
  if (b.kind == kOne || !table.head_bytes) return;
  uint8_t* to[4] = {room, room + kRoom, room + 2 * kRoom, room + 3 * kRoom};
#if defined(__x86_64__)
  if (cpu_isa() == Isa::avx512 && expands_bytes())
    huffman_streams(b.raw, b.size, table.codes, to);
  else
#endif
    streams(b.raw, b.size, table.codes, to);
  for (int i = 0; i < 4; ++i) b.coded[i] = to[i] - (room + i * kRoom);
}

// Kind and size of a block that is coded; `pending`: the table did not come with the block it was for.
void settle(Block& b, const Table& table, bool& pending) {
  pending |= b.fresh;
  b.fresh = pending;
  b.bytes =
      frame_of(b) + (b.fresh ? table.head_bytes : 0) + b.coded[0] + b.coded[1] + b.coded[2] + b.coded[3];
  if (b.kind == kOne)
    b.bytes = 1;
  else if (!table.head_bytes || b.bytes >= b.n)
    b.kind = kPlain, b.bytes = b.n;
  else
    pending = false;
}

void write(const Block& b, const Table& table, bool last, const uint8_t* room, uint8_t* to) {
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
  for (int i = 0; i < 4; to += b.coded[i++]) std::memcpy(to, room + i * kRoom, size_t(b.coded[i]));
  *to = 0;  // no sequences
}

}  // namespace

int64_t huffman_bound(int64_t n) { return n + kBlockHead * blocks_of(n) + kFrameHead; }

int64_t huffman_encode(const uint8_t* raw, int64_t n, int64_t limit, int threads, uint8_t* out) {
  const int64_t each = block_of(n), number = blocks_of(n);
  std::vector<Block> blocks(static_cast<size_t>(number));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t i = 0; i < number; ++i) {
    Block& b = blocks[size_t(i)];
    b.raw = raw + i * each;
    b.n = i + 1 < number ? each : n - i * each;
    count(b, n >= kSampled);
  }
  const std::vector<HuffmanCounts> counts = share_tables(blocks, n >= kSampled);
  std::vector<Table> tables(counts.size());
  for (size_t i = 0; i < tables.size(); ++i) {
    Table& t = tables[i];
    if (symbols_of(counts[i]) == 1) continue;  // blocks of one symbol
    t.lengths = code_lengths(counts[i]);
    codes_of(t.lengths, t.codes);
    t.head_bytes = write_table(t.lengths, t.head);
  }
  // no window: nothing repeats, so that of a block will do; content size of 2, 4 or 8 bytes
  uint8_t head[kFrameHead] = {0x28, 0xB5, 0x2F, 0xFD, 0, (17 - 10) << 3};
  const int wide = n < 256 + (1 << 16) ? 1 : n <= int64_t(UINT32_MAX) ? 2 : 3;
  head[4] = uint8_t(wide << 6);
  const uint64_t content = wide == 1 ? uint64_t(n - 256) : uint64_t(n);
  std::memcpy(head + 6, &content, size_t(1) << wide);
  int64_t total = 6 + (1 << wide), about = total;
  for (int64_t i = 0, sent = -1; i < number; ++i) {
    const Block& b = blocks[size_t(i)];
    const Table& table = tables[size_t(b.table)];
    const int64_t bytes = expected(b, table) + (sent != b.table && b.kind != kOne ? table.head_bytes : 0);
    about += kBlockHead + std::min(bytes, b.n);
    if (bytes < b.n && b.kind != kOne) sent = b.table;
  }
  if (about >= limit) return -about;
  std::memcpy(out, head, size_t(total));
  const int64_t group = std::min<int64_t>(std::max(threads, 1), number);
  uint8_t* rooms = reinterpret_cast<uint8_t*>(thread_scratch().take(group * kRoom));
  bool pending = false;
  for (int64_t first = 0; first < number; first += group) {
    const int64_t end = std::min(first + group, number);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = first; i < end; ++i) {
      Block& b = blocks[size_t(i)];
      code(b, tables[size_t(b.table)], rooms + (i - first) * 4 * kRoom);
    }
    for (int64_t i = first; i < end; ++i) {
      Block& b = blocks[size_t(i)];
      const Table& table = tables[size_t(b.table)];
      settle(b, table, pending);
      write(b, table, i + 1 == number, rooms + (i - first) * 4 * kRoom, out + total);
      total += kBlockHead + b.bytes;
    }
  }
  return total < limit ? total : -total;
}

}  // namespace autoflip
