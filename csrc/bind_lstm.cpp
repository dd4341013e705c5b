// A dense LSTM layer's steps: what depends on the step before or behind. Addresses in.
#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "bindings.h"
#include "common/cpu.h"
#include "cpu/coarse.h"
#include "cpu/lstm_walk.h"

namespace py = pybind11;

namespace autoflip {
namespace {

#if defined(__x86_64__)
const LstmWalk& walk() { return pick(lstm_walk_base, lstm_walk_avx2, lstm_walk_avx512); }
const RecurrentCell& cell() { return pick(recurrent_base, recurrent_avx2, recurrent_avx512); }
#else
const LstmWalk& walk() { return lstm_walk_base; }
const RecurrentCell& cell() { return recurrent_base; }
#endif

using Sizes = std::array<int64_t, 4>;  // steps, samples, hidden, inputs

int threads_for(const LstmShape& s, int threads) {
  return s.factors * s.samples * s.hidden * 4 < kSerialElements ? 1 : threads;
}

void forward(uintptr_t w, uintptr_t bias, uintptr_t h0, uintptr_t gates, uintptr_t cells, uintptr_t y,
             const Sizes& sizes, int threads) {
  LstmShape s = {sizes[0], sizes[1], sizes[2], sizes[3], 1};
  walk().forward(s, cell(), at<float>(w), at<float>(bias), at<float>(h0), at<float>(gates), at<float>(cells),
                 at<float>(y), threads_for(s, threads));
}

using Addresses = std::vector<uintptr_t>;  // one a factor

template <class T>
std::vector<T*> pointers(const Addresses& factors) {
  std::vector<T*> found;
  for (uintptr_t address : factors) found.push_back(at<T>(address));
  return found;
}

void back(uintptr_t w_hh, uintptr_t w_ih, uintptr_t gates, uintptr_t cells, const Addresses& dy,
          int64_t dy_step, int64_t dy_sample, uintptr_t dh, uintptr_t dc, const Addresses& d,
          const Addresses& dx, const Sizes& sizes, bool coarse, int threads) {
  LstmShape s = {sizes[0], sizes[1], sizes[2], sizes[3], static_cast<int64_t>(dy.size())};
  auto from = pointers<const float>(dy);
  auto to_d = pointers<void>(d);
  auto to_dx = pointers<float>(dx);
  const auto run = coarse ? coarse_bf16.lstm_back : walk().back;
  run(s, at<float>(w_hh), at<float>(w_ih), at<float>(gates), at<float>(cells),
      {from.data(), dy_step, dy_sample}, at<float>(dh), at<float>(dc), to_d.data(), to_dx.data(),
      threads_for(s, threads));
}

}  // namespace

void bind_lstm(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def(
      "multiplies_bf16", [] { return coarse_bf16.lstm_back && multiplies_bf16(); },
      "whether `coarse` may be asked for");
  m.def("lstm_forward", forward,
        "gates (steps, n, 4 h): x's products in, activated out; cells (steps + 1, n, h): the "
        "first in",
        release());
  m.def(
      "lstm_back", back,
      "each factor's d (steps, n, 4 h), bfloat16 where `coarse`; dh and dc (factors, n, h): in and out; w_ih "
      "may be 0",
      release());
}

}  // namespace autoflip
