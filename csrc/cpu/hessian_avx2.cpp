#include "cpu/hessian_impl.h"

namespace autoflip {
const HessianKernels kHessianAvx2 = {squares_scratch, squares, rademacher};
}
