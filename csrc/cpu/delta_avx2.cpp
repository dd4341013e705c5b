#include "cpu/delta_impl.h"

namespace autoflip {

const DeltaKernels kDeltaAvx2 = kTable;

}  // namespace autoflip
