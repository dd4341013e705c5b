// One convolution's sizes and its products by addresses: what Python calls, and the steps of
// bind_masked_conv.cpp.
#pragma once
#include <array>
#include <cstdint>

#include "cpu/masked_conv_layout.h"

namespace autoflip {

// Memory for a panel. Some that is out of use is kept: fresh pages cost more than the conversion into them.
// To be made and dropped while Python's lock is held.
class ConvPanel {
 public:
  explicit ConvPanel(int64_t floats);
  ~ConvPanel();
  ConvPanel(const ConvPanel&) = delete;
  ConvPanel& operator=(const ConvPanel&) = delete;
  float* data() const { return data_; }
  int64_t floats() const { return floats_; }

 private:
  int64_t floats_;
  float* data_;
};

// One convolution's sizes: the panels of x and of dy, whose convolution with the turned kernel is dx.
struct ConvShape {
  Images x, dy;
  Kernel kernel;

  int64_t x_floats() const;
  int64_t dy_floats() const;
  // y = conv2d(x, weight at the layout) + bias, by way of x's panel, which is written; addresses, 0: none
  void forward(uintptr_t in, uintptr_t panel, uintptr_t lay, int64_t kept, uintptr_t weight, uintptr_t bias,
               uintptr_t y, int threads) const;
  // dx, dw and db, unless 0. x_in, dy_in 0: their panels are there, else they are written; dw keeps its
  // entries outside the layout
  void backward(uintptr_t x_in, uintptr_t x_panel, uintptr_t dy_in, uintptr_t dy_panel, uintptr_t dx_lay,
                uintptr_t dw_lay, int64_t kept, uintptr_t weight, uintptr_t dx, uintptr_t dw, uintptr_t db,
                int threads) const;
};

}  // namespace autoflip
