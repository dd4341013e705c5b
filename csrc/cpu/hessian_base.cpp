#include "cpu/hessian_back.h"
#include "cpu/hessian_dense.h"
#include "cpu/hessian_impl.h"
#include "cpu/hessian_pull_softmax.h"
#include "cpu/hessian_pull_squares.h"
#include "cpu/hessian_signs.h"
#include "cpu/hessian_steps.h"

namespace autoflip {
const HessianKernels kHessianBase = {
    squares_scratch, squares,         pull_back_scratch, pull_back, squared_matmul_scratch,
    squared_matmul,  dense_pull_back, softmax_pull,      gate_rows, squares_of_steps<Floats, float>,
    rademacher,      finite};
}
