// Sums over samples of squared per-sample gradients, and signs drawn from a counter, float32.
//
// squared  D[o, k] = sum_n d[n, o]^2 a[n, k]^2: squares are taken while a tile is loaded.
// conv     D[o, k] = sum_qn (sum_p d[q, n, o, p] u[n, p, k])^2, u the patches of x: a tile of patches is read
//          from x by address, a sample's sums stay in registers until they are squared.
// signs    out[i] = +-1, bit i % 64 of SplitMix64's word i / 64.
// Unmeasured on GPU (compiled for sm_80, sm_90 and sm_100 only): autoflip.ops uses it when asked for by name.
// Layout   row-major; x of conv by its strides, so that a sequence (N, P, K) is an image too.
// Grid     one block of 32 x 8 threads per 32 x 32 tile of D; conv: also groups and parts of the samples. A
// part
//          has its own D and the caller adds them in order: no atomics, the same bits on every run.
// Bound    shared memory: 4 multiply-adds for 5 loads; a tensor-core tile would be the next step.
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kTile = 32, kRows = 8, kSums = kTile / kRows;
constexpr dim3 kBlock(kTile, kRows);

struct Tiles {
  float a[kTile][kTile + 1];  // [o, j]; one column more: a warp reads a column without bank conflicts
  float b[kTile][kTile + 1];  // [j, k]
};

// sum[s] += sum_j a[row s, j] b[j, column]
__device__ void multiply(const Tiles& t, float* sum) {
#pragma unroll
  for (int j = 0; j < kTile; ++j)
#pragma unroll
    for (int s = 0; s < kSums; ++s)
      sum[s] = fmaf(t.a[threadIdx.y + s * kRows][j], t.b[j][threadIdx.x], sum[s]);
}

__global__ void squared_matmul_kernel(const float* d, const float* a, int64_t n, int64_t o, int64_t k,
                                      int squared, float* out) {
  __shared__ Tiles t;
  const int64_t o0 = int64_t(blockIdx.y) * kTile, k0 = int64_t(blockIdx.x) * kTile;
  float sum[kSums] = {};
  for (int64_t n0 = 0; n0 < n; n0 += kTile) {
#pragma unroll
    for (int i = threadIdx.y; i < kTile; i += kRows) {
      const int64_t row = n0 + i, left = o0 + threadIdx.x, right = k0 + threadIdx.x;
      const float v = row < n && left < o ? d[row * o + left] : 0.0f;
      const float u = row < n && right < k ? a[row * k + right] : 0.0f;
      t.a[threadIdx.x][i] = squared ? v : v * v;
      t.b[i][threadIdx.x] = u * u;
    }
    __syncthreads();
    multiply(t, sum);
    __syncthreads();
  }
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    const int64_t row = o0 + threadIdx.y + s * kRows, col = k0 + threadIdx.x;
    if (row < o && col < k) out[row * k + col] = sum[s];
  }
}

// In the order of autoflip.ops._hessian._cuda_conv; outputs, columns and channels are a group's.
struct Conv {
  int64_t factors, samples, groups, outputs, columns, positions, height, width, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t channels, step_n, step_c, step_h, step_w;  // x's strides
  int64_t parts, part;                               // and samples of one
};

__global__ void conv_squares_kernel(const float* d, const float* x, Conv c, float* out) {
  __shared__ Tiles t;
  const int64_t wide = (c.columns + kTile - 1) / kTile;
  const int64_t o0 = int64_t(blockIdx.x) / wide * kTile, k0 = int64_t(blockIdx.x) % wide * kTile;
  const int64_t g = blockIdx.y, part = blockIdx.z, col = k0 + threadIdx.x;
  // a thread's column of the filter: (channel, row, column)
  const int64_t taps = c.kernel_h * c.kernel_w;
  const int64_t up = col / c.kernel_w % c.kernel_h * c.dilation_h - c.pad_h;
  const int64_t left = col % c.kernel_w * c.dilation_w - c.pad_w;
  const float* plane = x + (g * c.channels + col / taps) * c.step_c;
  const int64_t end = min(c.samples, (part + 1) * c.part);
  float total[kSums] = {};
  for (int64_t n = part * c.part; n < end; ++n)
    for (int64_t q = 0; q < c.factors; ++q) {
      const float* row = d + (((q * c.samples + n) * c.groups + g) * c.outputs + o0) * c.positions;
      float sum[kSums] = {};
      for (int64_t p0 = 0; p0 < c.positions; p0 += kTile) {
#pragma unroll
        for (int i = threadIdx.y; i < kTile; i += kRows) {
          const int64_t across = p0 + threadIdx.x, p = p0 + i;
          t.a[i][threadIdx.x] =
              o0 + i < c.outputs && across < c.positions ? row[i * c.positions + across] : 0.0f;
          const int64_t h = p / c.out_width * c.stride_h + up, w = p % c.out_width * c.stride_w + left;
          const bool inside =
              p < c.positions && col < c.columns && h >= 0 && h < c.height && w >= 0 && w < c.width;
          t.b[i][threadIdx.x] = inside ? plane[n * c.step_n + h * c.step_h + w * c.step_w] : 0.0f;
        }
        __syncthreads();
        multiply(t, sum);
        __syncthreads();
      }
#pragma unroll
      for (int s = 0; s < kSums; ++s) total[s] = fmaf(sum[s], sum[s], total[s]);
    }
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    const int64_t o = o0 + threadIdx.y + s * kRows;
    if (o < c.outputs && col < c.columns)
      out[((part * c.groups + g) * c.outputs + o) * c.columns + col] = total[s];
  }
}

__device__ uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

__global__ void rademacher_kernel(uint64_t start, int64_t count, float* out) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const uint64_t word = mix(start + (uint64_t(i) / 64 + 1) * 0x9E3779B97F4A7C15ull);
    out[i] = word >> (i % 64) & 1 ? -1.0f : 1.0f;
  }
}

int64_t tiles(int64_t n) { return (n + kTile - 1) / kTile; }

}  // namespace

// Empty results launch nothing; gridDim.y and .z hold at most 65535, the wrapper in Python checks that.
extern "C" int squared_matmul_cuda(const float* d, const float* a, int64_t n, int64_t o, int64_t k,
                                   int squared, float* out, void* stream) {
  if (o && k)
    squared_matmul_kernel<<<dim3(unsigned(tiles(k)), unsigned(tiles(o))), kBlock, 0, cudaStream_t(stream)>>>(
        d, a, n, o, k, squared, out);
  return cudaGetLastError();
}

extern "C" int conv_squares_cuda(const float* d, const float* x, const int64_t* sizes, float* out,
                                 void* stream) {
  Conv c;
  static_assert(sizeof(Conv) == 24 * sizeof(int64_t), "sizes are copied as they come");
  for (int i = 0; i < 24; ++i) reinterpret_cast<int64_t*>(&c)[i] = sizes[i];
  const dim3 grid(unsigned(tiles(c.outputs) * tiles(c.columns)), unsigned(c.groups), unsigned(c.parts));
  if (grid.x && grid.y && grid.z)
    conv_squares_kernel<<<grid, kBlock, 0, cudaStream_t(stream)>>>(d, x, c, out);
  return cudaGetLastError();
}

extern "C" int rademacher_cuda(uint64_t start, int64_t count, float* out, void* stream) {
  const int64_t blocks = (count + 255) / 256;
  if (count)
    rademacher_kernel<<<unsigned(blocks < 65535 ? blocks : 65535), 256, 0, cudaStream_t(stream)>>>(
        start, count, out);
  return cudaGetLastError();
}
