#include <algorithm>
#include <cstring>

#include "cpu/masked_matmul_layout.h"

namespace autoflip {
namespace {

// vector multiply-adds below which a bucket of several rows costs more than it saves
constexpr int64_t kShortest = 8;

class Bytes {
 public:
  template <class T>
  void put(const std::vector<T>& items) {
    const size_t begin = bytes_.size();
    bytes_.resize(begin + items.size() * sizeof(T));
    if (!items.empty()) std::memcpy(bytes_.data() + begin, items.data(), items.size() * sizeof(T));
  }
  std::vector<uint8_t> bytes_;
};

// One group's counts and columns. `unit`: buckets of several rows hold multiples of it, so that loops which
// take that many columns at once leave nothing over.
void add_group(const uint8_t* patterns, int64_t width, int64_t unit, std::vector<uint16_t>& counts,
               std::vector<uint16_t>& columns) {
  const Buckets found = bucket_columns(patterns, width, unit, kShortest, columns);
  bool several = false;
  for (int slot = 0; slot + 1 < kPatterns; ++slot) {
    counts.push_back(uint16_t(found.whole[kPattern[slot]]));
    several |= counts.back() > 0;
  }
  for (int64_t single : found.singles) counts.push_back(uint16_t(single));
  counts.push_back(uint16_t(several ? 2 : found.kept ? 1 : 0));
}

struct Order {
  std::vector<int32_t> first;
  std::vector<uint16_t> counts, columns, bits;
  std::vector<int32_t> place;
};

Order groups_of(const uint8_t* mask, int64_t rows, int64_t cols, int64_t chunk) {
  const int64_t block = rows_of_block(rows), unit = chunk > kUnrolled ? 4 : 1;
  Order o;
  std::vector<uint8_t> patterns(size_t(chunk), 0);
  for (int64_t b = 0; b < rows; b += block)
    for (int64_t c = 0; c < cols; c += chunk) {
      const int64_t width = std::min(chunk, cols - c);
      o.first.push_back(int32_t(o.columns.size()));
      for (int64_t row = b; row < b + block; row += kGroup) {
        if (row >= rows) {
          o.counts.resize(o.counts.size() + kSlots);
          continue;
        }
        const int64_t live = std::min<int64_t>(kGroup, rows - row);
        patterns_of_rows(mask + row * cols + c, cols, live, width, patterns.data());
        add_group(patterns.data(), width, unit, o.counts, o.columns);
      }
    }
  o.first.push_back(int32_t(o.columns.size()));
  return o;
}

// bits[j] = bit i is set where row[16 j + i] is 1
void pack_bits(const uint8_t* row, int64_t width, uint16_t* bits) {
  for (int64_t k = 0; k < width; k += 16) {
    uint64_t low = 0, high = 0;
    const int64_t rest = std::min<int64_t>(16, width - k);
    std::memcpy(&low, row + k, size_t(std::min<int64_t>(rest, 8)));
    if (rest > 8) std::memcpy(&high, row + k + 8, size_t(rest - 8));
    constexpr uint64_t kGather =
        0x0102040810204080;  // the lowest bits of eight bytes, side by side at the top
    bits[k / 16] = uint16_t(low * kGather >> 56 | high * kGather >> 56 << 8);
  }
}

Order lists_of(const uint8_t* mask, int64_t rows, int64_t cols, int64_t chunk) {
  const int64_t block = rows_of_block(rows), words = words_of(chunk),
                lists = ceil_div(rows, block) * ceil_div(cols, chunk) * block;
  Order o;
  o.counts.resize(size_t(lists));
  o.bits.resize(size_t(lists * words));
  uint16_t *count = o.counts.data(), *bits = o.bits.data();
  for (int64_t b = 0; b < rows; b += block)
    for (int64_t c = 0; c < cols; c += chunk) {
      o.first.push_back(int32_t(o.columns.size()));
      for (int64_t row = b; row < b + block; ++row, ++count, bits += words) {
        if (row >= rows) continue;
        const size_t begin = o.columns.size();
        const int64_t width = std::min(chunk, cols - c);
        pack_bits(mask + row * cols + c, width, bits);
        for (int64_t k = 0; k < width; k += 16)
          for (unsigned left = bits[k / 16]; left; left &= left - 1)
            o.columns.push_back(uint16_t(k + __builtin_ctz(left)));
        *count = uint16_t(o.columns.size() - begin);
      }
    }
  o.first.push_back(int32_t(o.columns.size()));
  o.columns.resize(o.columns.size() + 16);
  return o;
}

// The lists of the columns of a mask whose rows have these lists. Blocks follow each other down the rows, so
// that a column meets its rows in order.
Order turned_lists(const Order& lists, int64_t rows, int64_t cols, int64_t chunk) {
  const int64_t block = rows_of_block(rows), chunks = ceil_div(cols, chunk);
  const int64_t own = rows_of_block(cols), own_chunks = ceil_div(rows, chunk);
  const auto each =
      [&](auto&& visit) {  // visit(the list of a column in a chunk of rows, its row in the chunk, place)
        int32_t place = 0;
        for (int64_t cell = 0; cell + 1 < int64_t(lists.first.size()); ++cell)
          for (int64_t r = 0; r < block; ++r) {
            const int64_t row = cell / chunks * block + r;
            for (int32_t end = place + lists.counts[size_t(cell * block + r)]; place < end; ++place) {
              const int64_t col = cell % chunks * chunk + lists.columns[size_t(place)];
              visit(size_t((col / own * own_chunks + row / chunk) * own + col % own), uint16_t(row % chunk),
                    place);
            }
          }
      };
  Order o;
  o.counts.resize(size_t(ceil_div(cols, own) * own_chunks * own));
  each([&](size_t list, uint16_t, int32_t) { ++o.counts[list]; });
  std::vector<int32_t> next(o.counts.size());
  int32_t total = 0;
  for (size_t list = 0; list < next.size(); ++list) {
    if (list % size_t(own) == 0) o.first.push_back(total);
    next[list] = total;
    total += o.counts[list];
  }
  o.first.push_back(total);
  o.columns.resize(size_t(total) + 16);
  o.place.resize(size_t(total));
  each([&](size_t list, uint16_t row, int32_t place) {
    o.columns[size_t(next[list])] = row;
    o.place[size_t(next[list]++)] = place;
  });
  return o;
}

Order turned_groups(const uint8_t* mask, int64_t rows, int64_t cols, int64_t chunk) {
  std::vector<uint8_t> turned(size_t(rows * cols));
  constexpr int64_t kTile = 64;
  for (int64_t r0 = 0; r0 < rows; r0 += kTile)
    for (int64_t c0 = 0; c0 < cols; c0 += kTile)
      for (int64_t c = c0; c < std::min(c0 + kTile, cols); ++c)
        for (int64_t r = r0; r < std::min(r0 + kTile, rows); ++r)
          turned[size_t(c * rows + r)] = mask[r * cols + c];
  return groups_of(turned.data(), cols, rows, chunk);
}

// where an order's parts stand, from `bytes` on; moves `bytes` past it
struct Parts {
  const int32_t* first;
  const uint16_t *counts, *columns;
};
Parts order_at(const uint8_t*& bytes, int64_t columns, int64_t slots, int64_t rows, int64_t cols,
               int64_t chunk) {
  const int64_t cells = ceil_div(rows, rows_of_block(rows)) * ceil_div(cols, chunk);
  const int32_t* first = reinterpret_cast<const int32_t*>(bytes);
  const uint16_t* counts = reinterpret_cast<const uint16_t*>(first + cells + 1);
  slots *= cells;
  bytes = reinterpret_cast<const uint8_t*>(counts + slots + (columns + 1) / 2 * 2);
  return {first, counts, counts + slots};
}
Groups groups_at(const uint8_t*& bytes, int64_t columns, int64_t rows, int64_t cols, int64_t chunk) {
  const int64_t block = rows_of_block(rows);
  const Parts p = order_at(bytes, columns, block / kGroup * kSlots, rows, cols, chunk);
  return {p.first, p.counts, p.columns, rows, cols, block, chunk};
}
Lists lists_at(const uint8_t*& bytes, int64_t columns, int64_t words, int64_t rows, int64_t cols,
               int64_t chunk) {
  const int64_t block = rows_of_block(rows);
  const Parts p = order_at(bytes, columns, block, rows, cols, chunk);
  const uint16_t* bits = reinterpret_cast<const uint16_t*>(bytes);
  bytes += ceil_div(rows, block) * ceil_div(cols, chunk) * block * words * 2;
  return {p.first, p.counts, p.columns, bits, rows, cols, block, chunk};
}

}  // namespace

std::vector<uint8_t> masked_matmul_orders(const uint8_t* mask, int64_t rows, int64_t cols, int64_t chunk,
                                          bool groups, bool back) {
  constexpr size_t kMost = 4;
  Order orders[kMost];  // groups, groups of columns, lists, lists of columns
  const bool wanted[kMost] = {groups, groups && back, true, !groups && back};
  orders[2] = lists_of(mask, rows, cols, chunk);
  if (wanted[0]) orders[0] = groups_of(mask, rows, cols, chunk);
  if (wanted[1]) orders[1] = turned_groups(mask, rows, cols, chunk);
  if (wanted[3]) orders[3] = turned_lists(orders[2], rows, cols, chunk);
  std::vector<int32_t> sizes;
  Bytes out;
  for (size_t i = 0; i < kMost; ++i) {
    sizes.push_back(wanted[i] ? int32_t(orders[i].columns.size()) : -1);
    if (orders[i].columns.size() % 2) orders[i].columns.push_back(0);
  }
  out.put(sizes);
  for (size_t i = 0; i < kMost; ++i)
    if (wanted[i]) {
      out.put(orders[i].first);
      out.put(orders[i].counts);
      out.put(orders[i].columns);
      out.put(orders[i].bits);
      out.put(orders[i].place);
    }
  return std::move(out.bytes_);
}

Orders masked_matmul_orders_at(const uint8_t* bytes, int64_t rows, int64_t cols, int64_t chunk) {
  const int32_t* sizes = reinterpret_cast<const int32_t*>(bytes);
  Orders o = {};
  bytes += 16;
  if (sizes[0] >= 0) o.groups = groups_at(bytes, sizes[0], rows, cols, chunk);
  if (sizes[1] >= 0) o.back = groups_at(bytes, sizes[1], cols, rows, chunk);
  o.lists = lists_at(bytes, sizes[2], words_of(chunk), rows, cols, chunk);
  if (sizes[3] >= 0) {
    o.columns = lists_at(bytes, sizes[3], 0, cols, rows, chunk);
    o.place = reinterpret_cast<const int32_t*>(bytes);
  }
  return o;
}

}  // namespace autoflip
