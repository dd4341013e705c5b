#include "bindings.h"

namespace autoflip {

void bind_hessian(pybind11::module_&) {}

}  // namespace autoflip
