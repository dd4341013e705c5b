// Huffman coding of bytes: zstd frames of literals alone (RFC 8878), which any reader of zstd reads. It is
// what zstd writes itself where nothing repeats, with optimal codes and at several times its speed.
//
// Source: Huffman 1952; Larmore and Hirschberg, "A fast algorithm for optimal length-limited Huffman codes",
// JACM 37(3), 1990; Collet and Kucherawy, RFC 8878.
#pragma once
#include <cstdint>

namespace autoflip {

constexpr int64_t kHuffmanLeast = 1 << 12;  // fewer bytes are not coded

// Room for the frame of n bytes.
int64_t huffman_bound(int64_t n);

// Codes n bytes into `out` and returns the frame's bytes; where that is `limit` bytes or more, or counts say
// so beforehand, it returns how many below zero. Any number of threads writes the same bytes.
int64_t huffman_encode(const uint8_t* raw, int64_t n, int64_t limit, int threads, uint8_t* out);

// Reads into n bytes; returns false for bytes that huffman_encode did not write, of which zstd may know more.
bool huffman_decode(const uint8_t* data, int64_t bytes, int64_t n, int threads, uint8_t* out);

// A symbol's code in the low 16 bits, its length in the high ones.
using HuffmanCodes = uint32_t[256];

// The four streams of a block, which begin at `raw` and hold size[i] bytes each, from their last byte to the
// first; each into its own `to`, which whole words are written to and which moves on. At AVX-512 with VBMI:
void huffman_streams(const uint8_t* raw, const int64_t* size, const HuffmanCodes& codes, uint8_t** to);

// there[s] = 1 for each symbol of the n bytes; others stay. At AVX-512 with VBMI:
void huffman_present(const uint8_t* raw, int64_t n, uint8_t* there);

}  // namespace autoflip
