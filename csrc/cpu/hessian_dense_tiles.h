// A dense layer in AMX's tiles. D[o, k] = sum_n v[n, o] a[at[n], k]^2 of hessian_dense.h: squares rounded to
// bfloat16, sums in float32. Zeros are not looked for: a tile of products takes less than finding them.
//
// Work     256 samples at a time: what v's rows of each add up to becomes words by output (two samples a
// word), the
//          squares of a panel of columns words of the other side; a tile of D stays in its registers over all
//          of them.
// Threads  each owns panels of columns: the bits do not depend on their number.
#pragma once
#include <omp.h>

#include <cstring>

#include "cpu/amx_tile.h"
#include "cpu/hessian_groups.h"
#include "cpu/hessian_plan.h"

#if defined(__AMX_BF16__)
namespace {

constexpr int64_t kTiledSamples = 256, kTiledWords = kTiledSamples / 2;

inline int64_t tiled_outputs(int64_t O) { return (O + Tiles::kRows - 1) / Tiles::kRows * Tiles::kRows; }

inline int64_t dense_pull_back_tiles_scratch(int64_t rows, int64_t O, int threads) {
  return (tiled_outputs(rows) + threads * kPanel) * Tiles::whole((O + 1) / 2) + kAlign;
}

inline int64_t squared_matmul_tiles_scratch(int64_t, int64_t O, int threads) {
  return tiled_outputs(O) * (kTiledWords + 2) + threads * kTiledWords * kPanel + kAlign;
}

// The first `count` of a vector's values.
inline __mmask16 masked_to(int64_t count) {
  return static_cast<__mmask16>(count >= W ? 0xffff : count > 0 ? (1u << count) - 1 : 0);
}

// Words of two rows' `width` columns (`second` may be null: zeros), or of their squares, zeros up to a
// panel's.
template <bool kSquared>
inline void panel_words(const float* first, const float* second, int64_t width, float* words) {
  auto half = [](Vec v) {
    __m256bh rounded = _mm512_cvtneps_pbh(kSquared ? v * v : v);
    __m256i bits;
    __builtin_memcpy(&bits, &rounded, sizeof bits);
    return _mm512_maskz_cvtepu16_epi32(0xffff, bits);
  };
  for (int64_t i = 0; i < kPanel; i += W) {
    __mmask16 these = masked_to(width - i);
    Vec x = _mm512_maskz_loadu_ps(these, first + i);
    Vec y = second == nullptr ? splat(0.f) : _mm512_maskz_loadu_ps(these, second + i);
    _mm512_storeu_si512(words + i, _mm512_or_si512(half(x), _mm512_maskz_slli_epi32(0xffff, half(y), 16)));
  }
}

// A panel of `count` rows, which row_of gives: words of two of them each, zeros up to `room` words.
template <bool kSquared, class RowOf>
inline void fill_panel(RowOf row_of, int64_t count, int64_t room, int64_t width, float* panel) {
  for (int64_t j = 0; 2 * j < count; ++j)
    panel_words<kSquared>(row_of(2 * j), 2 * j + 1 < count ? row_of(2 * j + 1) : nullptr, width,
                          panel + j * kPanel);
  int64_t words = (count + 1) / 2;
  std::memset(panel + words * kPanel, 0, sizeof(float) * (room - words) * kPanel);
}

// v's sums over the rows of each of `some` groups from `begin` on, as words [output][word]; `row` has room
// for two.
inline void tiled_rows(const float* d, const DenseGroups& groups, int64_t begin, int64_t some, int64_t O,
                       bool squared, int64_t room, float* row, float* to) {
  int64_t wide = tiled_outputs(O);
  std::memset(to, 0, sizeof(float) * wide * room);
  for (int64_t j = 0; 2 * j < some; ++j) {
    std::memset(row, 0, sizeof(float) * 2 * wide);
    for (int64_t u = begin + 2 * j; u < begin + least(2 * j + 2, some); ++u)
      for (int64_t n = groups.first[u]; n < groups.first[u + 1]; ++n) {
        const float* from = d + n * O;
        float* sums = row + (u - begin - 2 * j) * wide;
        for (int64_t o = 0; o < O; ++o) sums[o] += squared ? from[o] : from[o] * from[o];
      }
    Tiles::words(row, wide);
    for (int64_t o = 0; o < O; ++o) to[o * room + j] = row[o];
  }
}

inline int64_t squared_matmul_tiles(const float* d, const float* a, const int64_t* at, float* out,
                                    float* scratch, int64_t N, int64_t O, int64_t K, bool squared,
                                    int threads) {
  DenseGroups groups(at, N);
  int64_t panels = (K + kPanel - 1) / kPanel;
  float *v = aligned(scratch), *row = v + tiled_outputs(O) * kTiledWords,
        *memory = row + 2 * tiled_outputs(O);
  if (N == 0) std::memset(out, 0, sizeof(float) * O * K);
  for (int64_t begin = 0; begin < groups.count(); begin += kTiledSamples) {
    int64_t some = least(kTiledSamples, groups.count() - begin), room = Tiles::whole((some + 1) / 2);
    tiled_rows(d, groups, begin, some, O, squared, room, row, v);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      Tiles::Held held;
      float* panel = memory + omp_get_thread_num() * kTiledWords * kPanel;
      alignas(64) float sums[Tiles::kRows * Tiles::kColumns];
#pragma omp for schedule(static)
      for (int64_t p = 0; p < panels; ++p) {
        int64_t first = p * kPanel, width = least(kPanel, K - first);
        auto row_of = [&](int64_t u) { return a + groups.from[begin + u] * K + first; };
        fill_panel<true>(row_of, some, room, width, panel);
        for (int64_t o = 0; o < O; o += Tiles::kRows)
          for (int64_t c = 0; c < width; c += Tiles::kColumns) {
            int64_t high = least(Tiles::kRows, O - o), wide = least(Tiles::kColumns, width - c);
            tile_product(v + o * room, room, high, panel + c, wide, room, sums);
            for (int64_t r = 0; r < high; ++r) {
              float* to = out + (o + r) * K + first + c;
              const float* from = sums + r * Tiles::kColumns;
              for (int64_t i = 0; i < wide; i += W) {
                __mmask16 these = masked_to(wide - i);
                Vec sum = load(from + i);
                if (begin > 0) sum = sum + _mm512_maskz_loadu_ps(these, to + i);
                _mm512_mask_storeu_ps(to + i, these, sum);
              }
            }
          }
      }
    }
  }
  return groups.count() * O * K;
}

// See hessian.h.
inline int64_t dense_pull_back_tiles(const float* const* d, const float* w, const float* gate,
                                     const int64_t* at, float* out, float* scratch, int64_t factors,
                                     int64_t N, int64_t O, int64_t K, bool squared, int threads) {
  int64_t panels = (K + kPanel - 1) / kPanel, room = Tiles::whole((O + 1) / 2), rows = factors * N;
  float *words = aligned(scratch), *memory = words + tiled_outputs(rows) * room;
  std::memset(words, 0, sizeof(float) * tiled_outputs(rows) * room);
  for (int64_t r = 0; r < rows; ++r)
    round_to_bf16(d[r / N] + r % N * O, O, reinterpret_cast<uint16_t*>(words + r * room));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Tiles::Held held;
    float* panel = memory + omp_get_thread_num() * room * kPanel;
    alignas(64) float sums[Tiles::kRows * Tiles::kColumns];
#pragma omp for schedule(static)
    for (int64_t p = 0; p < panels; ++p) {
      int64_t first = p * kPanel, width = least(kPanel, K - first);
      fill_panel<false>([&](int64_t o) { return w + o * K + first; }, O, room, width, panel);
      for (int64_t r = 0; r < rows; r += Tiles::kRows)
        for (int64_t c = 0; c < width; c += Tiles::kColumns) {
          int64_t high = least(Tiles::kRows, rows - r), wide = least(Tiles::kColumns, width - c);
          tile_product(words + r * room, room, high, panel + c, wide, room, sums);
          for (int64_t i = 0; i < high; ++i) {
            int64_t n = (r + i) % N, place = first + c;
            float* to = out + (squared ? n : r + i) * K + place;
            const float* open = gate == nullptr ? nullptr : gate + (at == nullptr ? n : at[n]) * K + place;
            for (int64_t v = 0; v < wide; v += W) {
              __mmask16 these = masked_to(wide - v), kept = these;
              if (open != nullptr)
                kept = _mm512_mask_cmp_ps_mask(these, _mm512_maskz_loadu_ps(these, open + v), splat(0.f),
                                               _CMP_GT_OQ);
              Vec sum = _mm512_maskz_mov_ps(kept, load(sums + i * Tiles::kColumns + v));
              if (squared) sum = r + i < N ? sum * sum : fma(sum, sum, _mm512_maskz_loadu_ps(these, to + v));
              _mm512_mask_storeu_ps(to + v, these, sum);
            }
          }
        }
    }
  }
  return rows * O * K;
}

}  // namespace
#endif
