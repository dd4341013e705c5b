// y[N, O] = act(x[N, K] @ (w * mask)[O, K].T + b) and its two gradients, float32, tiles without a kept weight
// skipped.
//
// Unmeasured on GPU (compiled for sm_80, sm_90 and sm_100 only): autoflip.ops uses it when asked for by name.
// Layout   row-major; `live[ceil(O/32), ceil(K/32)]` uint8, one flag per 32 x 32 weight tile that keeps any
// entry;
//          the element mask (uint8 0/1, shaped like w) is applied while a live tile is loaded.
// Grid     one block of 32 x 8 threads per 32 x 32 tile of the result; a thread sums 4 rows in registers.
// Sums     float32 FMA in index order, no atomics: the same bits on every run.
// Source   tile skipping as in Gale et al., "Sparse GPU Kernels for Deep Learning", SC 2020.
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kTile = 32, kRows = 8, kSums = kTile / kRows;

struct Tiles {
  float a[kTile][kTile + 1];  // one column more: a warp reads a column without bank conflicts
  float b[kTile][kTile + 1];
};

// t[i][j] = p[(row0 + i) * cols + col0 + j], zero outside (rows, cols)
__device__ void load_tile(float (*t)[kTile + 1], const float* p, int64_t rows, int64_t cols, int64_t row0,
                          int64_t col0) {
#pragma unroll
  for (int i = threadIdx.y; i < kTile; i += kRows) {
    const int64_t r = row0 + i, c = col0 + threadIdx.x;
    t[i][threadIdx.x] = r < rows && c < cols ? p[r * cols + c] : 0.0f;
  }
}

// the same where the mask is set
__device__ void load_masked(float (*t)[kTile + 1], const float* p, const uint8_t* mask, int64_t rows,
                            int64_t cols, int64_t row0, int64_t col0) {
#pragma unroll
  for (int i = threadIdx.y; i < kTile; i += kRows) {
    const int64_t r = row0 + i, c = col0 + threadIdx.x;
    t[i][threadIdx.x] = r < rows && c < cols && mask[r * cols + c] ? p[r * cols + c] : 0.0f;
  }
}

__global__ void masked_matmul_fwd_kernel(const float* x, const float* w, const uint8_t* mask,
                                         const uint8_t* live, const float* bias, int64_t n, int64_t o,
                                         int64_t k, int relu, float* y) {
  __shared__ Tiles t;
  const int64_t n0 = int64_t(blockIdx.x) * kTile, o0 = int64_t(blockIdx.y) * kTile;
  const int64_t tiles = (k + kTile - 1) / kTile;
  float sum[kSums] = {};
  for (int64_t i_k = 0; i_k < tiles; ++i_k) {
    if (!live[blockIdx.y * tiles + i_k])
      continue;  // one flag for the whole block: no thread waits at a barrier
    load_tile(t.a, x, n, k, n0, i_k * kTile);
    load_masked(t.b, w, mask, o, k, o0, i_k * kTile);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kTile; ++j)
#pragma unroll
      for (int s = 0; s < kSums; ++s)
        sum[s] = fmaf(t.a[threadIdx.y + s * kRows][j], t.b[threadIdx.x][j], sum[s]);
    __syncthreads();
  }
  const int64_t col = o0 + threadIdx.x;
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    const int64_t row = n0 + threadIdx.y + s * kRows;
    if (row >= n || col >= o) continue;
    const float v = sum[s] + (bias ? bias[col] : 0.0f);
    y[row * o + col] = relu && v < 0 ? 0.0f : v;  // NaN stays NaN
  }
}

__global__ void masked_matmul_dx_kernel(const float* dy, const float* w, const uint8_t* mask,
                                        const uint8_t* live, int64_t n, int64_t o, int64_t k, float* dx) {
  __shared__ Tiles t;
  const int64_t n0 = int64_t(blockIdx.x) * kTile, k0 = int64_t(blockIdx.y) * kTile;
  const int64_t tiles_o = (o + kTile - 1) / kTile, tiles_k = gridDim.y;
  float sum[kSums] = {};
  for (int64_t i_o = 0; i_o < tiles_o; ++i_o) {
    if (!live[i_o * tiles_k + blockIdx.y]) continue;
    load_tile(t.a, dy, n, o, n0, i_o * kTile);
    load_masked(t.b, w, mask, o, k, i_o * kTile, k0);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kTile; ++j)
#pragma unroll
      for (int s = 0; s < kSums; ++s)
        sum[s] = fmaf(t.a[threadIdx.y + s * kRows][j], t.b[j][threadIdx.x], sum[s]);
    __syncthreads();
  }
  const int64_t col = k0 + threadIdx.x;
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    const int64_t row = n0 + threadIdx.y + s * kRows;
    if (row < n && col < k) dx[row * k + col] = sum[s];
  }
}

// writes every entry of dw: zero where the mask is not set
__global__ void masked_matmul_dw_kernel(const float* dy, const float* x, const uint8_t* mask,
                                        const uint8_t* live, int64_t n, int64_t o, int64_t k, float* dw) {
  __shared__ Tiles t;
  const int64_t o0 = int64_t(blockIdx.x) * kTile, k0 = int64_t(blockIdx.y) * kTile;
  float sum[kSums] = {};
  if (live[blockIdx.x * int64_t(gridDim.y) + blockIdx.y]) {
    for (int64_t n0 = 0; n0 < n; n0 += kTile) {
      load_tile(t.a, dy, n, o, n0, o0);
      load_tile(t.b, x, n, k, n0, k0);
      __syncthreads();
#pragma unroll
      for (int j = 0; j < kTile; ++j)
#pragma unroll
        for (int s = 0; s < kSums; ++s)
          sum[s] = fmaf(t.a[j][threadIdx.y + s * kRows], t.b[j][threadIdx.x], sum[s]);
      __syncthreads();
    }
  }
  const int64_t col = k0 + threadIdx.x;
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    const int64_t row = o0 + threadIdx.y + s * kRows;
    if (row < o && col < k) dw[row * k + col] = mask[row * k + col] ? sum[s] : 0.0f;
  }
}

constexpr dim3 kBlock(kTile, kRows);

unsigned tiles(int64_t n) { return unsigned((n + kTile - 1) / kTile); }

}  // namespace

// Empty results launch nothing; gridDim.y holds at most 65535 tiles, the wrapper in Python checks that.
extern "C" int masked_matmul_fwd_cuda(const float* x, const float* w, const uint8_t* mask,
                                      const uint8_t* live, const float* bias, int64_t n, int64_t o, int64_t k,
                                      int relu, float* y, void* stream) {
  if (n && o)
    masked_matmul_fwd_kernel<<<dim3(tiles(n), tiles(o)), kBlock, 0, cudaStream_t(stream)>>>(
        x, w, mask, live, bias, n, o, k, relu, y);
  return cudaGetLastError();
}

extern "C" int masked_matmul_dx_cuda(const float* dy, const float* w, const uint8_t* mask,
                                     const uint8_t* live, int64_t n, int64_t o, int64_t k, float* dx,
                                     void* stream) {
  if (n && k)
    masked_matmul_dx_kernel<<<dim3(tiles(n), tiles(k)), kBlock, 0, cudaStream_t(stream)>>>(dy, w, mask, live,
                                                                                           n, o, k, dx);
  return cudaGetLastError();
}

extern "C" int masked_matmul_dw_cuda(const float* dy, const float* x, const uint8_t* mask,
                                     const uint8_t* live, int64_t n, int64_t o, int64_t k, float* dw,
                                     void* stream) {
  if (o && k)
    masked_matmul_dw_kernel<<<dim3(tiles(o), tiles(k)), kBlock, 0, cudaStream_t(stream)>>>(dy, x, mask, live,
                                                                                           n, o, k, dw);
  return cudaGetLastError();
}
