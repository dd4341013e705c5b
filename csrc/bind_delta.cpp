#include "bindings.h"

namespace autoflip {

void bind_delta(pybind11::module_&) {}

}  // namespace autoflip
