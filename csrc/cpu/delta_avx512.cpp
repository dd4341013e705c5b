#include "cpu/delta_impl.h"

namespace autoflip {

const DeltaKernels kDeltaAvx512 = kTable;

}  // namespace autoflip
