// Rows times a packed panel of columns in AMX's tiles: bfloat16 with float32 sums, as Halves of rows_tile.h,
// whose time an LSTM's walk back took 0.22 of (Xeon, Emerald Rapids).
#pragma once
#include "cpu/rows_tile.h"

#if defined(__AMX_BF16__)
namespace {

// While it lives this thread's tiles are 16 rows of 64 bytes; then they are what they were: other libraries
// configure theirs once for many calls.
class TilesHeld {
 public:
  TilesHeld() {
    _tile_storeconfig(before_);
    alignas(64) uint8_t wanted[64] = {1};  // palette 1; bytes of a row from 16 on, two each; rows from 48 on
    for (int i = 0; i < 8; ++i) wanted[16 + 2 * i] = 64, wanted[48 + i] = 16;
    barrier();
    _tile_loadconfig(wanted);
  }
  ~TilesHeld() {
    if (before_[0] == 0)
      _tile_release();
    else
      _tile_loadconfig(before_);
  }
  TilesHeld(const TilesHeld&) = delete;
  TilesHeld& operator=(const TilesHeld&) = delete;

  // What was written is in memory: the compiler knows nothing of a tile's reads.
  static void barrier() { __asm__ volatile("" ::: "memory"); }

 private:
  alignas(64) uint8_t before_[64];
};

struct Tiles : Halves {
  static constexpr int64_t kRows = 32, kColumns = 32;  // of sums: four tiles of 16 x 16
  static constexpr int64_t kWords = 16;                // a tile's inner dimension
  static constexpr bool kTiled = true;
  static int64_t whole(int64_t words) { return (words + kWords - 1) / kWords * kWords; }
  using Held = TilesHeld;
};

// sums[r][c] (kColumns a row) = row r of `a`, `stride` words each, times column c of a panel; `words` is a
// multiple of kWords. Up to 16 R rows and 16 C columns are computed.
template <int R, int C>
inline void tile_product(const float* a, int64_t stride, const float* panel, int64_t words, float* sums) {
  constexpr int64_t kFloat = sizeof(float), kSide = 16;
  TilesHeld::barrier();
  _tile_zero(0);
  if constexpr (C > 1) _tile_zero(1);
  if constexpr (R > 1) _tile_zero(2);
  if constexpr (R > 1 && C > 1) _tile_zero(3);
  for (int64_t j = 0; j < words; j += Tiles::kWords) {
    _tile_loadd(4, panel + j * kPanel, kPanel * kFloat);
    if constexpr (C > 1) _tile_loadd(5, panel + j * kPanel + kSide, kPanel * kFloat);
    _tile_loadd(6, a + j, stride * kFloat);
    _tile_dpbf16ps(0, 6, 4);
    if constexpr (C > 1) _tile_dpbf16ps(1, 6, 5);
    if constexpr (R > 1) {
      _tile_loadd(7, a + kSide * stride + j, stride * kFloat);
      _tile_dpbf16ps(2, 7, 4);
      if constexpr (C > 1) _tile_dpbf16ps(3, 7, 5);
    }
  }
  constexpr int64_t kRow = Tiles::kColumns * kFloat;
  _tile_stored(0, sums, kRow);
  if constexpr (C > 1) _tile_stored(1, sums + kSide, kRow);
  if constexpr (R > 1) _tile_stored(2, sums + kSide * Tiles::kColumns, kRow);
  if constexpr (R > 1 && C > 1) _tile_stored(3, sums + kSide * Tiles::kColumns + kSide, kRow);
}

inline void tile_product(const float* a, int64_t stride, int64_t rows, const float* panel, int64_t columns,
                         int64_t words, float* sums) {
  if (rows > 16)
    columns > 16 ? tile_product<2, 2>(a, stride, panel, words, sums)
                 : tile_product<2, 1>(a, stride, panel, words, sums);
  else
    columns > 16 ? tile_product<1, 2>(a, stride, panel, words, sums)
                 : tile_product<1, 1>(a, stride, panel, words, sums);
}

}  // namespace
#endif
