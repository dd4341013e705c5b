// What the bindings of the codec's kernels share: the kernels for this machine, and chunks of entries by
// thread.
#pragma once
#include <atomic>

#include "common/cpu.h"
#include "cpu/delta.h"

namespace autoflip {

inline const DeltaKernels& kernels() {
#if defined(__x86_64__)
  static const DeltaKernels& chosen = pick(kDeltaBase, kDeltaAvx2, kDeltaAvx512);
#else
  static const DeltaKernels& chosen = kDeltaBase;
#endif
  return chosen;
}

inline constexpr int64_t kAroundCaches = 1 << 21;  // entries from which outputs are written around the caches

inline int64_t words_of(int64_t n) { return (n + 63) / 64; }
inline int64_t chunks_of(int64_t n) { return (words_of(n) + kDeltaChunkWords - 1) / kDeltaChunkWords; }

// Calls each(first word, first entry, entries, chunk) for every 2^18 entries, on `threads` threads.
template <class Each>
void each_chunk(int64_t n, int threads, Each each) {
  const int64_t entries = 64 * kDeltaChunkWords, chunks = chunks_of(n);
  auto one = [&](int64_t c) {
    const int64_t first = c * entries;
    each(c * kDeltaChunkWords, first, n - first < entries ? n - first : entries, c);
  };
  if (threads <= 1 || chunks <= 1) {
    for (int64_t c = 0; c < chunks; ++c) one(c);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t c = 0; c < chunks; ++c) one(c);
}

// As each_chunk, but no chunk begins before the one before it has begun.
template <class Each>
void each_in_turn(int64_t n, int threads, Each each) {
  const int64_t entries = 64 * kDeltaChunkWords, chunks = chunks_of(n);
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads) if (threads > 1)
  for (int64_t c; (c = next.fetch_add(1)) < chunks;) {
    const int64_t first = c * entries;
    each(c * kDeltaChunkWords, first, n - first < entries ? n - first : entries, c);
  }
}

}  // namespace autoflip
