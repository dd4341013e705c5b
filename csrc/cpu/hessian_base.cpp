#include "cpu/hessian_impl.h"

namespace autoflip {
const HessianKernels kHessianBase = {squares_scratch, squares, rademacher};
}
