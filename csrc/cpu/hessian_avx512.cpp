#include "cpu/hessian_impl.h"

namespace autoflip {
const HessianKernels kHessianAvx512 = {squares_scratch, squares, rademacher};
}
