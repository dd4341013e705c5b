// autoflip._C: addresses, sizes and thread counts in, nothing of torch. Python checks every dtype, shape,
// device and contiguity before it calls (autoflip/ops); nothing is checked twice here.
#include "bindings.h"

#include "common/cpu.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "autoflip's CPU kernels; use autoflip.ops, which checks what these functions take on trust";
  m.def(
      "isa", [] { return autoflip::isa_name(autoflip::cpu_isa()); },
      "instruction set that serves this process");
  autoflip::bind_masked_matmul(m);
  autoflip::bind_hook(m);
  autoflip::bind_few(m);
  autoflip::bind_masked_conv(m);
  autoflip::bind_ans(m);
  autoflip::bind_delta(m);
  autoflip::bind_hessian(m);
  autoflip::bind_recurrent(m);
}
