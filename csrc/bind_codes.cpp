// The codings of a delta's index, and the entropy coders.
#include <cstring>
#include <vector>

#include "bindings.h"
#include "cpu/ans.h"
#include "cpu/huffman.h"
#include "delta_chunks.h"

namespace py = pybind11;

namespace autoflip {
namespace {

int64_t delta_rice_bits(uintptr_t words, int64_t n, int k) {
  return kernels().rice_bits(at<uint64_t>(words), words_of(n), k);
}

int64_t delta_rice_encode(uintptr_t words, int64_t n, int k, uintptr_t out) {
  return kernels().rice_encode(at<uint64_t>(words), words_of(n), k, at<uint8_t>(out));
}

int64_t delta_rice_decode(uintptr_t data, int64_t bytes, int64_t n, int64_t kept, int k, uintptr_t words) {
  return kernels().rice_decode(at<uint8_t>(data), bytes, n, kept, k, at<uint64_t>(words));
}

// Bytes that each 2^18 entries may take beyond their share of what n take: those of a gap that began before
// them, and those stored past the end.
constexpr int64_t kVarintRange = 16 + kVarintSlack;

int64_t delta_varint_encode(uintptr_t words, uintptr_t offsets, int64_t n, uintptr_t out, int threads) {
  const uint64_t* held = at<uint64_t>(words);
  const int64_t* ranks = at<int64_t>(offsets);
  uint8_t* to = at<uint8_t>(out);
  if (threads <= 1 || n <= 64 * kDeltaChunkWords) return kernels().varint_encode(held, words_of(n), 0, to);
  const int64_t entries = 64 * kDeltaChunkWords;
  std::vector<int64_t> bytes(size_t((n + entries - 1) / entries));
  const auto place = [&](int64_t c) {
    return to + ranks[c] + (c * entries - ranks[c]) / 128 + c * kVarintRange;
  };
  each_chunk(n, threads, [&](int64_t word, int64_t first, int64_t size, int64_t c) {
    int64_t last = word;  // the last word before these that keeps an entry
    while (last && !held[last - 1]) --last;
    const int64_t skipped = first - 64 * last + (last ? __builtin_clzll(held[last - 1]) : 0);
    bytes[size_t(c)] = kernels().varint_encode(held + word, words_of(size), skipped, place(c));
  });
  int64_t total = 0;
  for (size_t c = 0; c < bytes.size(); total += bytes[c++])
    std::memmove(to + total, place(int64_t(c)), size_t(bytes[c]));
  return total;
}

int64_t delta_varint_decode(uintptr_t data, int64_t bytes, int64_t n, int64_t kept, uintptr_t words) {
  return kernels().varint_decode(at<uint8_t>(data), bytes, n, kept, at<uint64_t>(words));
}

int64_t bound(int64_t n) { return n + n / 2 + kAnsHeader + 64; }

int64_t encode(uintptr_t raw, int64_t n, uintptr_t companion, int key, int64_t limit, uintptr_t out) {
  return ans_encode(at<uint8_t>(raw), n, at<uint8_t>(companion), key, limit, at<uint8_t>(out));
}

int64_t decode(uintptr_t data, int64_t bytes, uintptr_t companion, int64_t n, uintptr_t out) {
  return ans_decode(at<uint8_t>(data), bytes, at<uint8_t>(companion), n, at<uint8_t>(out));
}

int64_t literals(uintptr_t raw, int64_t n, int64_t limit, int threads, uintptr_t out) {
  return huffman_encode(at<uint8_t>(raw), n, limit, threads, at<uint8_t>(out));
}

bool read_literals(uintptr_t data, int64_t bytes, int64_t n, int threads, uintptr_t out) {
  return huffman_decode(at<uint8_t>(data), bytes, n, threads, at<uint8_t>(out));
}

}  // namespace

void bind_codes(py::module_& m) {
  using free_gil = py::call_guard<py::gil_scoped_release>;
  m.def("delta_rice_bits", delta_rice_bits, free_gil());
  m.def("delta_rice_encode", delta_rice_encode, free_gil());
  m.def("delta_rice_decode", delta_rice_decode, free_gil());
  m.attr("VARINT_RANGE") = kVarintRange;
  m.def("delta_varint_encode", delta_varint_encode, free_gil());
  m.def("delta_varint_decode", delta_varint_decode, free_gil());
  m.def("ans_bound", bound);
  m.def("ans_encode", encode, free_gil());
  m.def("ans_decode", decode, free_gil());
  m.attr("HUFFMAN_LEAST") = kHuffmanLeast;
  m.def("huffman_bound", huffman_bound);
  m.def("huffman_encode", literals, free_gil());
  m.def("huffman_decode", read_literals, free_gil());
}

}  // namespace autoflip
