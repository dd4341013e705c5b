#include "bindings.h"
#include "cpu/ans.h"
#include "cpu/huffman.h"

namespace py = pybind11;

namespace autoflip {
namespace {

int64_t bound(int64_t n) { return n + n / 2 + kAnsHeader + 64; }

int64_t encode(uintptr_t raw, int64_t n, uintptr_t companion, int key, int64_t limit, uintptr_t out) {
  return ans_encode(at<uint8_t>(raw), n, at<uint8_t>(companion), key, limit, at<uint8_t>(out));
}

int64_t decode(uintptr_t data, int64_t bytes, uintptr_t companion, int64_t n, uintptr_t out) {
  return ans_decode(at<uint8_t>(data), bytes, at<uint8_t>(companion), n, at<uint8_t>(out));
}

int64_t literals(uintptr_t raw, int64_t n, int64_t limit, int threads, uintptr_t out) {
  return huffman_encode(at<uint8_t>(raw), n, limit, threads, at<uint8_t>(out));
}

bool read_literals(uintptr_t data, int64_t bytes, int64_t n, int threads, uintptr_t out) {
  return huffman_decode(at<uint8_t>(data), bytes, n, threads, at<uint8_t>(out));
}

}  // namespace

void bind_ans(py::module_& m) {
  using free_gil = py::call_guard<py::gil_scoped_release>;
  m.def("ans_bound", bound);
  m.def("ans_encode", encode, free_gil());
  m.def("ans_decode", decode, free_gil());
  m.attr("HUFFMAN_LEAST") = kHuffmanLeast;
  m.def("huffman_bound", huffman_bound);
  m.def("huffman_encode", literals, free_gil());
  m.def("huffman_decode", read_literals, free_gil());
}

}  // namespace autoflip
