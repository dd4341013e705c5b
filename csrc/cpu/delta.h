// Sparse-delta coding on the CPU: one table of functions per instruction set, all with the same results.
//
// words    little-endian bits, bit i = entry i of the tensor is kept; spare bits of the last word are 0
// kept     set bits of the words given: no function reads or writes a value past it
// All functions work on one range; bind_delta.cpp cuts tensors into ranges for threads.
#pragma once
#include <cstdint>

namespace autoflip {

constexpr int64_t kDeltaBlock = 256;           // kept entries that share a scale
constexpr int64_t kDeltaChunkWords = 1 << 12;  // words of a thread's range: 2^18 entries
constexpr int kVarintSlack = 64;               // bytes: whole vectors are stored
constexpr int kRiceEscape = 24;                // this many ones announce a plain 32-bit gap

// How values travel; the numbers are those of the wire format. A stream is a byte plane, or the codes.
enum ValueKind : int { kFp32 = 0, kBf16 = 1, kInt8 = 2, kInt4 = 3 };

// Where rounding's random numbers come from: number r of a key, or always one half (to the nearest).
struct DeltaKey {
  uint32_t key0, key1;
  uint32_t keep, half;  // the number is (random & keep) | half: ~0, 0 or 0, 2^31
};

struct DeltaCoding {
  int kind;
  uint8_t* streams[4];  // fp32: four planes, lowest first; bf16: two; int8: codes; int4: two codes a byte
  float* scales;        // int8 and int4: one per 256 ranks
  int levels;           // int8 and int4, up to 127 and 7; see quantise, as for
  float largest;
  DeltaKey key;
  // After drop_zeros: scale b is for ranks starts[b] to starts[b + 1] - 1, of which there are 1 to 256; null
  // elsewhere. The last start is the number of values.
  const int64_t* starts;
  int64_t blocks;
};

enum IndexError : int64_t { kShort = -1, kRange = -2, kPadding = -3, kLong = -4 };

struct DeltaKernels {
  // words[i] from 0/1 bytes, and from x != 0
  void (*pack)(const uint8_t* mask, int64_t n, uint64_t* words);
  void (*pack_nonzero)(const float* x, int64_t n, uint64_t* words);
  int64_t (*count)(const uint64_t* words, int64_t num_words);
  // out = the mask's bits at the ranks that are set: bit `first`.. of the num_ranks bits of `ranks`
  void (*within)(const uint64_t* mask, int64_t num_words, const uint64_t* ranks, int64_t num_ranks,
                 int64_t first, uint64_t* out);
  // out = (x - base)[kept]; base may be null; returns whether any of the n differences is NaN or infinite;
  // nt: around the caches
  bool (*gather)(const float* x, const float* base, const uint64_t* words, int64_t n, int64_t kept, bool nt,
                 float* out);
  // out[kept] = values, 0 elsewhere
  void (*expand)(const float* values, const uint64_t* words, int64_t n, int64_t kept, float* out);
  // out[kept] += weight * values (product rounded first)
  void (*expand_add)(const float* values, const uint64_t* words, int64_t n, int64_t kept, float weight,
                     float* out);
  // blocks of 256: scale = clip(max|x| / levels, FLT_MIN, largest), codes = floor(x / scale) + (u < frac);
  // `first` is the rank of values[0], a multiple of 256
  void (*quantise)(const float* values, int64_t n, int levels, float largest, DeltaKey key, int64_t first,
                   int8_t* codes, float* scales);
  void (*dequantise)(const int8_t* codes, const float* scales, int64_t n, float* values);
  void (*round_bf16)(const float* values, int64_t n, DeltaKey key, int64_t first, uint16_t* words);
  // One range of a tensor, x - base (base may be null, words too: every entry) at ranks `rank`.. into the
  // streams; returns whether a difference is NaN or infinite. Blocks of 256 that reach over the range's ends
  // are left to the caller: their values go to `loose` in order, at most 510. `found` is null, or `words` to
  // be filled beforehand: x != 0 (base is null then).
  bool (*encode)(const float* x, const float* base, const uint64_t* words, int64_t n, int64_t rank,
                 const DeltaCoding& coding, float* loose, uint64_t* found);
  // out[kept] = decoded values from rank `rank` on, 0 elsewhere; nt: around the caches (out 64-byte aligned)
  void (*decode)(const DeltaCoding& coding, const uint64_t* words, int64_t n, int64_t rank, bool nt,
                 float* out);
  // out[kept] += weight * decoded values (product rounded first)
  void (*decode_add)(const DeltaCoding& coding, const uint64_t* words, int64_t n, int64_t rank, float weight,
                     float* out);
  // values (n <= 256, one block) to the streams at rank `first`
  void (*code_values)(const float* values, int64_t n, int64_t first, const DeltaCoding& coding);
  // Leaves out the int8 or int4 codes that are 0, in place: words = which of the n ranks stay, counts = how
  // many of each block of 256 do, less 1; a block of zeros alone keeps its first. Returns how many stay in
  // all.
  int64_t (*drop_zeros)(int kind, uint8_t* codes, int64_t n, uint64_t* words, uint8_t* counts);
  // whether streams of hostile origin hold only finite values and codes that encode writes (scales not seen)
  bool (*valid)(const DeltaCoding& coding, int64_t n);
  // byte planes of 2- and 4-byte values: plane b of value i is planes[b * n + i]
  void (*split2)(const uint16_t* values, int64_t n, uint8_t* planes);
  void (*split4)(const uint32_t* values, int64_t n, uint8_t* planes);
  void (*merge2)(const uint8_t* planes, int64_t n, uint16_t* values);
  void (*merge4)(const uint8_t* planes, int64_t n, uint32_t* values);
  // Rice code of the gaps between set bits, bits filled from the lowest
  int64_t (*rice_bits)(const uint64_t* words, int64_t num_words, int k);
  // both write at most what ops/delta_coding.py works out beforehand, and return the bytes written
  int64_t (*rice_encode)(const uint64_t* words, int64_t num_words, int k, uint8_t* out);
  // reads `kept` positions below n into zeroed words; returns bytes used or an IndexError. `data` is hostile.
  int64_t (*rice_decode)(const uint8_t* data, int64_t bytes, int64_t n, int64_t kept, int k, uint64_t* words);
  // gaps as LEB128, with room for kVarintSlack bytes behind the last; `skipped` entries lie between the last
  // kept one and the words; varint_decode as rice_decode
  int64_t (*varint_encode)(const uint64_t* words, int64_t num_words, int64_t skipped, uint8_t* out);
  int64_t (*varint_decode)(const uint8_t* data, int64_t bytes, int64_t n, int64_t kept, uint64_t* words);
};

extern const DeltaKernels kDeltaBase;
extern const DeltaKernels kDeltaAvx2;
extern const DeltaKernels kDeltaAvx512;

}  // namespace autoflip
