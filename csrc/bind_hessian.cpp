#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.h"
#include "common/cpu.h"
#include "common/scratch.h"
#include "cpu/coarse.h"
#include "cpu/deal.h"
#include "cpu/hessian.h"
#include "cpu/softmax_draw.h"

namespace autoflip {
namespace {

const HessianKernels& kernels() {
#if defined(__x86_64__)
  return pick(kHessianBase, kHessianAvx2, kHessianAvx512);
#else
  return kHessianBase;
#endif
}

int threads_for(int64_t elements, int threads) { return elements < kSerialElements ? 1 : threads; }

using Addresses = std::vector<uintptr_t>;  // of d, one a factor

std::vector<const float*> pointers(const Addresses& d) {
  std::vector<const float*> values;
  for (uintptr_t address : d) values.push_back(at<float>(address));
  return values;
}

// entries, samples, outputs, groups, channels, height, width, out_height, out_width, kernel_height,
// kernel_width, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w
using Sizes = std::array<int64_t, 17>;

SquaresShape shape_of(const Addresses& d, const Sizes& s) {
  return {static_cast<int64_t>(d.size()),
          s[1],
          s[2],
          s[3],
          s[4],
          s[5],
          s[6],
          s[7],
          s[8],
          s[9],
          s[10],
          s[11],
          s[12],
          s[13],
          s[14],
          s[15],
          s[16],
          s[0]};
}

int64_t conv_squares(const Addresses& d, uintptr_t x, uintptr_t at_, uintptr_t out, const Sizes& sizes,
                     int threads) {
  const HessianKernels& k = kernels();
  SquaresShape shape = shape_of(d, sizes);
  threads = threads_for(shape.factors * shape.samples * shape.outputs * shape.positions(), threads);
  Scratch& scratch = thread_scratch();
  std::vector<const float*> values = pointers(d);
  int64_t ran = k.squares(values.data(), at<float>(x), at<int64_t>(at_), at<float>(out),
                          scratch.take(k.squares_scratch(shape, threads)), shape, threads);
  scratch.settle();
  return ran;
}

int64_t conv_pull_back(const Addresses& d, uintptr_t weight, uintptr_t at_, uintptr_t dx, const Sizes& sizes,
                       int threads) {
  const HessianKernels& k = kernels();
  SquaresShape shape = shape_of(d, sizes);
  threads = threads_for(shape.factors * shape.samples * shape.outputs * shape.entries, threads);
  Scratch& scratch = thread_scratch();
  std::vector<const float*> values = pointers(d);
  int64_t ran = k.pull_back(values.data(), at<float>(weight), at<int64_t>(at_), at<float>(dx),
                            scratch.take(k.pull_back_scratch(shape, threads)), shape, threads);
  scratch.settle();
  return ran;
}

// columns, then the strides as StepsInput has them
using Input = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

// sizes: samples, outputs, positions, then the strides as StepsShape has them; `coarse`: d is bfloat16
int64_t sequence_squares(const Addresses& d, const std::vector<Input>& u, uintptr_t out,
                         const std::array<int64_t, 6>& sizes, bool coarse, int threads) {
  const auto& s = sizes;
  std::vector<StepsInput> inputs;
  for (const auto& [values, columns, sample, position] : u)
    inputs.push_back({at<const float>(values), columns, sample, position});
  StepsShape shape = {static_cast<int64_t>(d.size()), s[0], s[1], s[2],
                      static_cast<int64_t>(u.size()), s[3], s[4], s[5]};
  threads = threads_for(shape.factors * shape.samples * shape.outputs * shape.positions, threads);
  if (coarse) {
    std::vector<const uint16_t*> halves;
    for (uintptr_t address : d) halves.push_back(at<const uint16_t>(address));
    return coarse_kernels()->sequence_squares(halves.data(), inputs.data(), at<float>(out), shape, threads);
  }
  std::vector<const float*> values = pointers(d);
  return kernels().sequence_squares(values.data(), inputs.data(), at<float>(out), shape, threads);
}

int64_t squared_matmul(uintptr_t d, uintptr_t a, uintptr_t rows, uintptr_t out, int64_t samples,
                       int64_t outputs, int64_t columns, bool squared, bool coarse, int threads) {
  const CoarseKernels* tiles = coarse ? coarse_kernels() : nullptr;
  coarse = tiles != nullptr && tiles->squared_matmul != nullptr;
  threads = threads_for(samples * outputs * columns / 16, threads);
  Scratch& scratch = thread_scratch();
  int64_t floats =
      (coarse ? tiles->squared_matmul_scratch : kernels().squared_matmul_scratch)(samples, outputs, threads);
  const auto run = coarse ? tiles->squared_matmul : kernels().squared_matmul;
  int64_t ran = run(at<float>(d), at<float>(a), at<int64_t>(rows), at<float>(out), scratch.take(floats),
                    samples, outputs, columns, squared, threads);
  scratch.settle();
  return ran;
}

int64_t dense_pull_back(const Addresses& d, uintptr_t w, uintptr_t gate, uintptr_t rows, uintptr_t out,
                        int64_t samples, int64_t outputs, int64_t columns, bool squared, bool tiled,
                        int threads) {
  int64_t factors = static_cast<int64_t>(d.size());
  threads = threads_for(factors * samples * outputs * columns / 16, threads);
  std::vector<const float*> values = pointers(d);
  if (tiled) {
    const CoarseKernels& k = *coarse_kernels();
    Scratch& scratch = thread_scratch();
    float* floats = scratch.take(k.dense_pull_back_scratch(factors * samples, outputs, threads));
    int64_t ran =
        k.dense_pull_back(values.data(), at<float>(w), at<float>(gate), at<int64_t>(rows), at<float>(out),
                          floats, factors, samples, outputs, columns, squared, threads);
    scratch.settle();
    return ran;
  }
  return kernels().dense_pull_back(values.data(), at<float>(w), at<float>(gate), at<int64_t>(rows),
                                   at<float>(out), factors, samples, outputs, columns, squared, threads);
}

// samples, classes, outputs, columns
int64_t softmax_pull(uintptr_t f, uintptr_t scale, const std::array<uintptr_t, 4>& layers,
                     const std::array<uintptr_t, 3>& out, const std::array<int64_t, 4>& sizes, bool squared,
                     int threads) {
  const auto& [samples, classes, outputs, width] = sizes;
  std::vector<float> own(samples * classes), step(samples * classes);
  std::vector<int64_t> likeliest(samples);
  softmax_steps(at<float>(f), at<float>(scale), own.data(), step.data(), at<float>(out[0]), likeliest.data(),
                samples, classes);
  threads = threads_for(samples * classes * outputs * width / 64, threads);
  return kernels().softmax_pull(
      {own.data(), step.data(), likeliest.data(), at<float>(layers[0]), at<float>(layers[1]),
       at<float>(layers[2]), at<float>(layers[3]), at<float>(out[1]), at<float>(out[2]), samples, classes,
       outputs, width, squared},
      threads);
}

// out[i] = sum_q d[q][i]^2
void factor_squares(const Addresses& d, uintptr_t out, int64_t count) {
  constexpr int64_t kPart = 2048;  // stays in the first-level cache
  for (int64_t begin = 0; begin < count; begin += kPart) {
    float* __restrict to = at<float>(out) + begin;
    int64_t some = std::min(kPart, count - begin);
    for (size_t q = 0; q < d.size(); ++q) {
      const float* from = at<float>(d[q]) + begin;
      for (int64_t i = 0; i < some; ++i) to[i] = q == 0 ? from[i] * from[i] : to[i] + from[i] * from[i];
    }
  }
}

bool all_finite(const std::vector<std::pair<uintptr_t, int64_t>>& tensors) {
  for (const auto& [address, count] : tensors)
    if (!kernels().finite(at<const float>(address), count)) return false;
  return true;
}

bool all_rows(uintptr_t rows, int64_t samples, int64_t count) {
  const int64_t* row = at<int64_t>(rows);
  bool all = true;
  for (int64_t n = 0; n < samples; ++n) all &= static_cast<uint64_t>(row[n]) < static_cast<uint64_t>(count);
  return all;
}

void gate_rows(uintptr_t v, uintptr_t gate, uintptr_t rows, int64_t samples, int64_t columns, bool squared) {
  kernels().gate_rows(at<float>(v), at<float>(gate), at<int64_t>(rows), samples, columns, squared);
}

void rademacher(uint64_t seed, uint64_t stream, uintptr_t out, int64_t count, int threads) {
  kernels().rademacher(seed, stream, at<float>(out), count, threads_for(count, threads));
}

void draw(uintptr_t f, uintptr_t scale, uintptr_t signs, uintptr_t out, int64_t rows, int64_t classes) {
  softmax_draw(at<float>(f), at<float>(scale), at<float>(signs), at<float>(out), rows, classes);
}

void columns(uintptr_t f, uintptr_t scale, uintptr_t out, int64_t rows, int64_t classes) {
  softmax_columns(at<float>(f), at<float>(scale), at<float>(out), rows, classes);
}

void weight(uintptr_t f, uintptr_t scale, uintptr_t out, int64_t rows, int64_t classes) {
  softmax_weight(at<float>(f), at<float>(scale), at<double>(out), rows, classes);
}

int64_t deal(uintptr_t weight, int64_t samples, double budget, int64_t most, double chance, uintptr_t sample,
             uintptr_t turn, uintptr_t scale) {
  return deal_rows(at<double>(weight), samples, budget, most, chance, at<int64_t>(sample), at<int64_t>(turn),
                   at<double>(scale));
}

int64_t dealt(uintptr_t f, uintptr_t scale, uint64_t seed, int64_t samples, int64_t classes, double budget,
              int64_t most, double alike, double chance, uintptr_t sample, uintptr_t v) {
  std::vector<float> signs(samples * classes);
  kernels().rademacher(seed, 0, signs.data(), samples * classes, 1);
  return softmax_deal(at<float>(f), at<float>(scale), signs.data(), samples, classes,
                      {budget, most, alike, chance}, at<int64_t>(sample), at<float>(v));
}

}  // namespace

void bind_hessian(pybind11::module_& m) {
  using release = pybind11::call_guard<pybind11::gil_scoped_release>;
  m.def("conv_squares", conv_squares, "returns the multiply-adds that ran", release());
  m.def("conv_pull_back", conv_pull_back, "returns the multiply-adds that ran", release());
  m.def("sequence_squares", sequence_squares, "returns the multiply-adds that ran", release());
  m.def("squared_matmul", squared_matmul,
        "`coarse`: squares may round to bfloat16; returns the multiply-adds that ran", release());
  m.def(
      "tiled", [] { return coarse_kernels() != nullptr && coarse_kernels()->dense_pull_back != nullptr; },
      "whether `tiled` may be asked for");
  m.def("dense_pull_back", dense_pull_back,
        "`tiled`: d and w round to bfloat16; returns the multiply-adds that ran", release());
  m.def("softmax_pull", softmax_pull, "returns the multiply-adds that ran", release());
  m.def("factor_squares", factor_squares, release());
  m.def("all_rows", all_rows, "whether each is a row of that many");
  m.def("all_finite", all_finite, "whether tensors (address, number of values) hold no NaN or Inf",
        release());
  m.def("gate_rows", gate_rows, release());
  m.def("softmax_draw", draw, release());
  m.def("softmax_columns", columns, release());
  m.def("softmax_weight", weight, release());
  m.def("deal_rows", deal, "returns how many rows there are", release());
  m.def("softmax_deal", dealt, "returns how many rows there are", release());
  m.def("rademacher", rademacher, release());
}

}  // namespace autoflip
