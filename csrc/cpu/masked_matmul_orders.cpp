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
  std::vector<uint16_t> counts, columns;
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

Order lists_of(const uint8_t* mask, int64_t rows, int64_t cols, int64_t chunk) {
  const int64_t block = rows_of_block(rows);
  Order o;
  for (int64_t b = 0; b < rows; b += block)
    for (int64_t c = 0; c < cols; c += chunk) {
      const int64_t width = std::min(chunk, cols - c);
      o.first.push_back(int32_t(o.columns.size()));
      for (int64_t row = b; row < b + block; ++row) {
        const size_t begin = o.columns.size();
        size_t kept = begin;
        o.columns.resize(begin + size_t(row < rows ? width + 1 : 0));
        const size_t slots = o.counts.size();
        o.counts.resize(slots + size_t(list_slots(chunk)));
        for (int64_t k = 0; row < rows && k < width; ++k) {
          const uint8_t keep = mask[row * cols + c + k];
          o.columns[kept] = uint16_t(k);
          kept += keep;
          o.counts[slots + 1 + size_t(k / 16)] |= uint16_t(keep << k % 16);
        }
        o.columns.resize(kept);
        o.counts[slots] = uint16_t(kept - begin);
      }
    }
  o.first.push_back(int32_t(o.columns.size()));
  o.columns.resize(o.columns.size() + 16);
  return o;
}

// where an order's parts stand, from `bytes` on; moves `bytes` past it
template <class T>
T order_at(const uint8_t*& bytes, int64_t columns, int64_t slots, int64_t rows, int64_t cols, int64_t chunk) {
  const int64_t block = rows_of_block(rows), cells = ceil_div(rows, block) * ceil_div(cols, chunk);
  const int32_t* first = reinterpret_cast<const int32_t*>(bytes);
  const uint16_t* counts = reinterpret_cast<const uint16_t*>(first + cells + 1);
  bytes = reinterpret_cast<const uint8_t*>(counts + cells * slots + (columns + 1) / 2 * 2);
  return {first, counts, counts + cells * slots, rows, cols, block, chunk};
}

int64_t group_slots(int64_t rows) { return rows_of_block(rows) / kGroup * kSlots; }

}  // namespace

std::vector<uint8_t> masked_matmul_orders(const uint8_t* mask, int64_t rows, int64_t cols, int64_t chunk,
                                          bool back) {
  std::vector<Order> orders = {groups_of(mask, rows, cols, chunk)};
  if (back) {
    std::vector<uint8_t> turned(size_t(rows * cols));
    constexpr int64_t kTile = 64;
    for (int64_t r0 = 0; r0 < rows; r0 += kTile)
      for (int64_t c0 = 0; c0 < cols; c0 += kTile)
        for (int64_t c = c0; c < std::min(c0 + kTile, cols); ++c)
          for (int64_t r = r0; r < std::min(r0 + kTile, rows); ++r)
            turned[size_t(c * rows + r)] = mask[r * cols + c];
    orders.push_back(groups_of(turned.data(), cols, rows, chunk));
  }
  orders.push_back(lists_of(mask, rows, cols, chunk));
  std::vector<int32_t> sizes = {0, back ? 0 : -1, 0, 0};
  Bytes out;
  for (size_t i = 0; i < orders.size(); ++i) {
    sizes[i + (i && !back)] = int32_t(orders[i].columns.size());
    if (orders[i].columns.size() % 2) orders[i].columns.push_back(0);
  }
  out.put(sizes);
  for (const Order& o : orders) {
    out.put(o.first);
    out.put(o.counts);
    out.put(o.columns);
  }
  return std::move(out.bytes_);
}

Orders masked_matmul_orders_at(const uint8_t* bytes, int64_t rows, int64_t cols, int64_t chunk) {
  const int32_t* sizes = reinterpret_cast<const int32_t*>(bytes);
  Orders o = {};
  bytes += 16;
  o.groups = order_at<Groups>(bytes, sizes[0], group_slots(rows), rows, cols, chunk);
  if (sizes[1] >= 0) o.back = order_at<Groups>(bytes, sizes[1], group_slots(cols), cols, rows, chunk);
  o.lists = order_at<Lists>(bytes, sizes[2], rows_of_block(rows) * list_slots(chunk), rows, cols, chunk);
  return o;
}

}  // namespace autoflip
