#include "cpu/coarse.h"

#include "common/cpu.h"

namespace autoflip {

const CoarseKernels* coarse_kernels() {
  if (coarse_amx.lstm_back && multiplies_tiles()) return &coarse_amx;
  return coarse_bf16.lstm_back && multiplies_bf16() ? &coarse_bf16 : nullptr;
}

}  // namespace autoflip
