// Shared-mask coding of a delta: gather kept entries, quantise blocks of 256, expand codes again.
//
// Unmeasured on GPU (compiled for sm_80, sm_90 and sm_100 only): autoflip.ops uses it when asked for by name.
// The bits are the CPU's: same counter-based random numbers, every product and sum rounded by itself.
// Layout   words: the mask, bit i of the whole = entry i; offsets[b] = kept entries before block b of 1024
//          entries, made once a mask, so that no scan and no synchronisation is left.
// Grid     gather, expand: 8 warps per 1024 entries, 4 words a warp; quantise: a warp per 256 ranks.
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kWarps = 8, kWords = 32;  // words of 32 bits in a block of 1024 entries

__device__ uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ x >> 16;
}

__device__ uint32_t random_bits(int64_t rank, uint32_t key0, uint32_t key1, bool nearest) {
  return nearest ? 1u << 31 : mix(mix(uint32_t(rank) + key0) ^ key1);
}

// Kept entries of the block before each of its words; every thread of the block must come here.
__device__ void word_offsets(const uint32_t* words, int64_t n, int* before) {
  if (threadIdx.x < kWords) {
    const int64_t w = int64_t(blockIdx.x) * kWords + threadIdx.x;
    int sum = w * 32 < n ? __popc(words[w]) : 0;
    const int own = sum;
    for (int step = 1; step < kWords; step *= 2) {
      const int other = __shfl_up_sync(~0u, sum, step);
      if (int(threadIdx.x) >= step) sum += other;
    }
    before[threadIdx.x] = sum - own;
  }
  __syncthreads();
}

__global__ void delta_gather_kernel(const float* x, const float* base, const uint32_t* words,
                                    const int64_t* offsets, int64_t n, float* out, int* bad) {
  __shared__ int before[kWords];
  word_offsets(words, n, before);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int i = warp; i < kWords; i += kWarps) {
    const int64_t w = int64_t(blockIdx.x) * kWords + i, o = w * 32 + lane;
    if (o >= n) continue;
    const float d = base ? __fsub_rn(x[o], base[o]) : x[o];
    if ((__float_as_uint(d) & 0x7F800000u) == 0x7F800000u) *bad = 1;
    const uint32_t word = words[w];
    if (word >> lane & 1) out[offsets[blockIdx.x] + before[i] + __popc(word & ((1u << lane) - 1))] = d;
  }
}

__global__ void delta_quantise_kernel(const float* x, int64_t n, float levels, float largest, uint32_t key0,
                                      uint32_t key1, bool nearest, int8_t* codes, float* scales) {
  const int64_t block = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32, first = block * 256;
  if (first >= n) return;
  const int lane = threadIdx.x % 32;
  float v[8];
  uint32_t top = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int64_t o = first + 32 * i + lane;
    v[i] = o < n ? x[o] : 0.0f;
    top = max(top, __float_as_uint(v[i]) & 0x7FFFFFFFu);
  }
  for (int step = 16; step; step /= 2) top = max(top, __shfl_xor_sync(~0u, top, step));
  float scale = 0, inverse = 0;
  if (top) {
    scale = fminf(fmaxf(__fdiv_rn(__uint_as_float(top), levels), 1.17549435e-38f), largest);
    inverse = __fdiv_rn(1.0f, scale);
  }
  if (lane == 0) scales[block] = scale;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int64_t o = first + 32 * i + lane;
    const float y = __fmul_rn(v[i], inverse), low = floorf(y);
    const float u = __fmul_rn(float(random_bits(o, key0, key1, nearest) >> 8), 5.9604644775390625e-08f);
    const float code = __fadd_rn(low, u < __fsub_rn(y, low) ? 1.0f : 0.0f);
    if (o < n) codes[o] = int8_t(fminf(fmaxf(code, -levels), levels));
  }
}

__global__ void delta_round_kernel(const float* x, int64_t n, uint32_t key0, uint32_t key1, bool nearest,
                                   uint16_t* words) {
  const int64_t o = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (o >= n) return;
  const uint32_t bits = __float_as_uint(x[o]);
  const uint32_t up = (bits + (random_bits(o, key0, key1, nearest) >> 16)) >> 16;
  words[o] = uint16_t((up & 0x7F80u) == 0x7F80u ? bits >> 16 : up);
}

// values: floats, or codes where there are scales
__global__ void delta_expand_kernel(const void* values, const float* scales, const uint32_t* words,
                                    const int64_t* offsets, int64_t n, float weight, bool add, float* out) {
  __shared__ int before[kWords];
  word_offsets(words, n, before);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int i = warp; i < kWords; i += kWarps) {
    const int64_t w = int64_t(blockIdx.x) * kWords + i, o = w * 32 + lane;
    if (o >= n) continue;
    const uint32_t word = words[w];
    float v = 0;
    const bool kept = word >> lane & 1;
    if (kept) {
      const int64_t rank = offsets[blockIdx.x] + before[i] + __popc(word & ((1u << lane) - 1));
      v = scales ? __fmul_rn(float(static_cast<const int8_t*>(values)[rank]), scales[rank / 256])
                 : static_cast<const float*>(values)[rank];
    }
    if (!add)
      out[o] = v;
    else if (kept)
      out[o] = __fadd_rn(out[o], __fmul_rn(weight, v));
  }
}

unsigned blocks(int64_t n, int64_t each) { return unsigned((n + each - 1) / each); }

}  // namespace

extern "C" {

int delta_gather_cuda(const float* x, const float* base, const uint32_t* words, const int64_t* offsets,
                      int64_t n, float* out, int* bad, void* stream) {
  if (n)
    delta_gather_kernel<<<blocks(n, 1024), 32 * kWarps, 0, cudaStream_t(stream)>>>(x, base, words, offsets, n,
                                                                                   out, bad);
  return cudaGetLastError();
}

int delta_quantise_cuda(const float* x, int64_t n, float levels, float largest, uint32_t key0, uint32_t key1,
                        bool nearest, int8_t* codes, float* scales, void* stream) {
  if (n)
    delta_quantise_kernel<<<blocks(n, 256 * kWarps), 32 * kWarps, 0, cudaStream_t(stream)>>>(
        x, n, levels, largest, key0, key1, nearest, codes, scales);
  return cudaGetLastError();
}

int delta_round_cuda(const float* x, int64_t n, uint32_t key0, uint32_t key1, bool nearest, uint16_t* words,
                     void* stream) {
  if (n)
    delta_round_kernel<<<blocks(n, 256), 256, 0, cudaStream_t(stream)>>>(x, n, key0, key1, nearest, words);
  return cudaGetLastError();
}

int delta_expand_cuda(const void* values, const float* scales, const uint32_t* words, const int64_t* offsets,
                      int64_t n, float weight, bool add, float* out, void* stream) {
  if (n)
    delta_expand_kernel<<<blocks(n, 1024), 32 * kWarps, 0, cudaStream_t(stream)>>>(
        values, scales, words, offsets, n, weight, add, out);
  return cudaGetLastError();
}

}  // extern "C"
