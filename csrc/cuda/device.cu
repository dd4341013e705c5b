// What the binding needs of the CUDA runtime; a .cu file, because only nvcc knows where the headers lie.
#include <cuda_runtime.h>

// Without a driver cudaGetDeviceCount fails: then there is no device, which is an answer and no error.
extern "C" int device_count_cuda() {
  int n = 0;
  if (cudaGetDeviceCount(&n) == cudaSuccess) return n;
  cudaGetLastError();  // forget it: the next launch must not report it
  return 0;
}

extern "C" const char* error_string_cuda(int error) { return cudaGetErrorString(cudaError_t(error)); }
