#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <vector>

#include "bindings.h"
#include "cpu/crc.h"
#include "delta_chunks.h"

namespace py = pybind11;

namespace autoflip {
namespace {

void delta_pack(uintptr_t mask, int64_t n, uintptr_t words, int threads) {
  each_chunk(n, threads, [&](int64_t word, int64_t first, int64_t size, int64_t) {
    kernels().pack(at<uint8_t>(mask) + first, size, at<uint64_t>(words) + word);
  });
}

void delta_pack_nonzero(uintptr_t x, int64_t n, uintptr_t words, int threads) {
  each_chunk(n, threads, [&](int64_t word, int64_t first, int64_t size, int64_t) {
    kernels().pack_nonzero(at<float>(x) + first, size, at<uint64_t>(words) + word);
  });
}

// (kept entries of x, those of them that are not zero) among `size` entries from each of the starts on, which
// are multiples of 64
std::array<int64_t, 2> delta_count_nonzero(uintptr_t x, uintptr_t words, const std::vector<int64_t>& starts,
                                           int64_t size) {
  constexpr int64_t kRun = 64;
  std::array<int64_t, 2> found{};
  for (int64_t start : starts) {
    for (int64_t first = 0; first < size; first += 64 * kRun) {
      uint64_t held[kRun];
      const int64_t n = size - first < 64 * kRun ? size - first : 64 * kRun, run = words_of(n);
      const uint64_t* mask = at<uint64_t>(words) + (start + first) / 64;
      kernels().pack_nonzero(at<float>(x) + start + first, n, held);
      for (int64_t i = 0; i < run; ++i) held[i] &= mask[i];
      found[0] += kernels().count(mask, run);
      found[1] += kernels().count(held, run);
    }
  }
  return found;
}

// offsets[c] = kept entries before chunk c; the last one is their number
void delta_offsets(uintptr_t words, int64_t n, uintptr_t offsets, int threads) {
  int64_t* out = at<int64_t>(offsets);
  each_chunk(n, threads, [&](int64_t word, int64_t, int64_t size, int64_t c) {
    out[c + 1] = kernels().count(at<uint64_t>(words) + word, words_of(size));
  });
  out[0] = 0;
  const int64_t chunks = (n + 64 * kDeltaChunkWords - 1) / (64 * kDeltaChunkWords);
  for (int64_t c = 0; c < chunks; ++c) out[c + 1] += out[c];
}

void delta_within(uintptr_t mask, uintptr_t offsets, uintptr_t ranks, int64_t num_ranks, int64_t n,
                  uintptr_t out, int threads) {
  each_chunk(n, threads, [&](int64_t word, int64_t, int64_t size, int64_t c) {
    kernels().within(at<uint64_t>(mask) + word, words_of(size), at<uint64_t>(ranks), num_ranks,
                     at<int64_t>(offsets)[c], at<uint64_t>(out) + word);
  });
}

// returns whether all differences are finite
bool delta_gather(uintptr_t x, uintptr_t base, uintptr_t words, uintptr_t offsets, int64_t n, uintptr_t out,
                  int threads) {
  const int64_t* ranks = at<int64_t>(offsets);
  const bool nt = ranks[chunks_of(n)] >= kAroundCaches;
  int bad = 0;
  each_chunk(n, threads, [&](int64_t word, int64_t first, int64_t size, int64_t c) {
    const float* b = base ? at<float>(base) + first : nullptr;
    if (kernels().gather(at<float>(x) + first, b, at<uint64_t>(words) + word, size, ranks[c + 1] - ranks[c],
                         nt, at<float>(out) + ranks[c])) {
#pragma omp atomic write
      bad = 1;
    }
  });
  return !bad;
}

void delta_expand(uintptr_t values, uintptr_t words, uintptr_t offsets, int64_t n, uintptr_t out,
                  int threads) {
  const int64_t* ranks = at<int64_t>(offsets);
  each_chunk(n, threads, [&](int64_t word, int64_t first, int64_t size, int64_t c) {
    kernels().expand(at<float>(values) + ranks[c], at<uint64_t>(words) + word, size, ranks[c + 1] - ranks[c],
                     at<float>(out) + first);
  });
}

void delta_expand_add(uintptr_t values, uintptr_t words, uintptr_t offsets, int64_t n, float weight,
                      uintptr_t out, int threads) {
  const int64_t* ranks = at<int64_t>(offsets);
  each_chunk(n, threads, [&](int64_t word, int64_t first, int64_t size, int64_t c) {
    kernels().expand_add(at<float>(values) + ranks[c], at<uint64_t>(words) + word, size,
                         ranks[c + 1] - ranks[c], weight, at<float>(out) + first);
  });
}

DeltaKey key_of(uint32_t key0, uint32_t key1, bool nearest) {
  return {key0, key1, nearest ? 0 : ~0u, nearest ? 1u << 31 : 0};
}

void delta_quantise(uintptr_t values, int64_t n, int levels, float largest, uint32_t key0, uint32_t key1,
                    bool nearest, uintptr_t codes, uintptr_t scales, int threads) {
  each_chunk(n, threads, [&](int64_t, int64_t first, int64_t size, int64_t) {
    kernels().quantise(at<float>(values) + first, size, levels, largest, key_of(key0, key1, nearest), first,
                       at<int8_t>(codes) + first, at<float>(scales) + first / kDeltaBlock);
  });
}

void delta_dequantise(uintptr_t codes, uintptr_t scales, int64_t n, uintptr_t values, int threads) {
  each_chunk(n, threads, [&](int64_t, int64_t first, int64_t size, int64_t) {
    kernels().dequantise(at<int8_t>(codes) + first, at<float>(scales) + first / kDeltaBlock, size,
                         at<float>(values) + first);
  });
}

void delta_round_bf16(uintptr_t values, int64_t n, uint32_t key0, uint32_t key1, bool nearest,
                      uintptr_t words, int threads) {
  each_chunk(n, threads, [&](int64_t, int64_t first, int64_t size, int64_t) {
    kernels().round_bf16(at<float>(values) + first, size, key_of(key0, key1, nearest), first,
                         at<uint16_t>(words) + first);
  });
}

// The streams' addresses come as a tuple of up to four.
DeltaCoding coding_of(int kind, const std::array<uintptr_t, 4>& streams, uintptr_t scales) {
  DeltaCoding c{};
  c.kind = kind;
  for (int i = 0; i < 4; ++i) c.streams[i] = at<uint8_t>(streams[size_t(i)]);
  c.scales = at<float>(scales);
  return c;
}

// offsets may be null with words: then every entry is kept. find: both are filled beforehand, with x != 0, in
// the same pass. Returns whether all differences are finite.
bool delta_encode(uintptr_t x, uintptr_t base, uintptr_t words, uintptr_t offsets, int64_t n, int kind,
                  std::array<uintptr_t, 4> streams, uintptr_t scales, int levels, float largest,
                  uint32_t key0, uint32_t key1, bool nearest, bool find, int threads) {
  DeltaCoding c = coding_of(kind, streams, scales);
  c.levels = levels, c.largest = largest, c.key = key_of(key0, key1, nearest);
  int64_t* ranks = at<int64_t>(offsets);
  const int64_t entries = 64 * kDeltaChunkWords, chunks = (n + entries - 1) / entries;
  auto rank = [&](int64_t chunk) { return words ? ranks[chunk] : chunk < chunks ? chunk * entries : n; };
  std::vector<float> loose(size_t(chunks) * 2 * kDeltaBlock);
  int bad = 0;
  std::atomic<int64_t> ranked{0};  // chunks before which the kept entries are counted
  if (find) ranks[0] = 0;
  const auto one = [&](int64_t word, int64_t first, int64_t size, int64_t chunk) {
    const float* b = base ? at<float>(base) + first : nullptr;
    uint64_t* w = words ? at<uint64_t>(words) + word : nullptr;
    if (find &&
        threads > 1) {  // the count of the chunk before is a short wait: the threads take them in turn
      kernels().pack_nonzero(at<float>(x) + first, size, w);
      const int64_t kept = kernels().count(w, words_of(size));
      while (ranked.load(std::memory_order_acquire) != chunk) std::this_thread::yield();
      ranks[chunk + 1] = ranks[chunk] + kept;
      ranked.store(chunk + 1, std::memory_order_release);
    }
    const bool fresh = find && threads == 1;
    if (kernels().encode(at<float>(x) + first, b, w, size, rank(chunk), c,
                         &loose[size_t(chunk) * 2 * kDeltaBlock], fresh ? w : nullptr)) {
#pragma omp atomic write
      bad = 1;
    }
    if (fresh) ranks[chunk + 1] = ranks[chunk] + kernels().count(w, words_of(size));
  };
  find ? each_in_turn(n, threads, one) : each_chunk(n, threads, one);
  if (bad || (kind != kInt8 && kind != kInt4)) return !bad;
  // blocks that reach over a range's end, put together here
  float block[kDeltaBlock];
  int64_t held = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t start = rank(chunk), end = rank(chunk + 1), before = -start & (kDeltaBlock - 1);
    const int64_t head = before < end - start ? before : end - start,
                  tail = (end - start - head) % kDeltaBlock;
    const float* values = &loose[size_t(chunk) * 2 * kDeltaBlock];
    for (int64_t i = 0; i < head + tail; ++i) {
      const int64_t place = i < head ? start + i : end - tail + (i - head);
      block[held++] = values[i];
      if ((place + 1) % kDeltaBlock == 0 || place + 1 == rank(chunks)) {
        kernels().code_values(block, held, place + 1 - held, c);
        held = 0;
      }
    }
  }
  return !bad;
}

int64_t delta_drop_zeros(int kind, uintptr_t codes, int64_t n, uintptr_t words, uintptr_t counts) {
  return kernels().drop_zeros(kind, at<uint8_t>(codes), n, at<uint64_t>(words), at<uint8_t>(counts));
}

// starts of so many blocks, or null: then each has 256
void delta_decode(int kind, std::array<uintptr_t, 4> streams, uintptr_t scales, uintptr_t starts,
                  int64_t blocks, uintptr_t words, uintptr_t offsets, int64_t n, uintptr_t out, int threads) {
  DeltaCoding c = coding_of(kind, streams, scales);
  c.starts = at<int64_t>(starts), c.blocks = blocks;
  const int64_t* ranks = at<int64_t>(offsets);
  const bool nt = n >= kAroundCaches && out % 64 == 0;
  each_chunk(n, threads, [&](int64_t word, int64_t first, int64_t size, int64_t chunk) {
    const uint64_t* w = words ? at<uint64_t>(words) + word : nullptr;
    kernels().decode(c, w, size, words ? ranks[chunk] : first, nt, at<float>(out) + first);
  });
}

void delta_decode_add(int kind, std::array<uintptr_t, 4> streams, uintptr_t scales, uintptr_t starts,
                      int64_t blocks, uintptr_t words, uintptr_t offsets, int64_t n, float weight,
                      uintptr_t out, int threads) {
  DeltaCoding c = coding_of(kind, streams, scales);
  c.starts = at<int64_t>(starts), c.blocks = blocks;
  const int64_t* ranks = at<int64_t>(offsets);
  each_chunk(n, threads, [&](int64_t word, int64_t first, int64_t size, int64_t chunk) {
    const uint64_t* w = words ? at<uint64_t>(words) + word : nullptr;
    kernels().decode_add(c, w, size, words ? ranks[chunk] : first, weight, at<float>(out) + first);
  });
}

bool delta_valid(int kind, std::array<uintptr_t, 4> streams, int64_t n) {
  return kernels().valid(coding_of(kind, streams, 0), n);
}

void delta_split(uintptr_t values, int64_t n, int width, uintptr_t planes) {
  if (width == 2)
    kernels().split2(at<uint16_t>(values), n, at<uint8_t>(planes));
  else
    kernels().split4(at<uint32_t>(values), n, at<uint8_t>(planes));
}

void delta_merge(uintptr_t planes, int64_t n, int width, uintptr_t values) {
  if (width == 2)
    kernels().merge2(at<uint8_t>(planes), n, at<uint16_t>(values));
  else
    kernels().merge4(at<uint8_t>(planes), n, at<uint32_t>(values));
}

}  // namespace

void bind_delta(py::module_& m) {
  using free_gil = py::call_guard<py::gil_scoped_release>;
  m.attr("DELTA_CHUNK") = 64 * kDeltaChunkWords;
  m.def("has_fast_crc", has_fast_crc);
  m.def(
      "crc32",
      [](uint32_t crc, uintptr_t data, int64_t bytes) { return crc32(crc, at<uint8_t>(data), bytes); },
      free_gil());
  m.def("delta_pack", delta_pack, free_gil());
  m.def("delta_pack_nonzero", delta_pack_nonzero, free_gil());
  m.def("delta_count_nonzero", delta_count_nonzero, free_gil());
  m.def("delta_offsets", delta_offsets, free_gil());
  m.def("delta_within", delta_within, free_gil());
  m.def("delta_gather", delta_gather, free_gil());
  m.def("delta_expand", delta_expand, free_gil());
  m.def("delta_expand_add", delta_expand_add, free_gil());
  m.def("delta_quantise", delta_quantise, free_gil());
  m.def("delta_dequantise", delta_dequantise, free_gil());
  m.def("delta_round_bf16", delta_round_bf16, free_gil());
  m.def("delta_encode", delta_encode, free_gil());
  m.def("delta_drop_zeros", delta_drop_zeros, free_gil());
  m.def("delta_decode", delta_decode, free_gil());
  m.def("delta_decode_add", delta_decode_add, free_gil());
  m.def("delta_valid", delta_valid, free_gil());
  m.def("delta_split", delta_split, free_gil());
  m.def("delta_merge", delta_merge, free_gil());
}

}  // namespace autoflip
