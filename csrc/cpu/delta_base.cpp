#include "cpu/delta_impl.h"

namespace autoflip {

const DeltaKernels kDeltaBase = kTable;

}  // namespace autoflip
