// Scratch panels, one buffer per calling thread, kept between calls because fresh pages cost more than a
// small product. Not for sources that are compiled for an instruction set.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

namespace autoflip {

class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  float* take(int64_t floats) {
    if (floats > size_) {
      std::free(data_);
      size_ = 0;
      data_ = static_cast<float*>(std::aligned_alloc(64, size_t((floats + 15) / 16 * 64)));
      if (!data_) throw std::bad_alloc();
      size_ = floats;
    }
    return data_;
  }
  // A buffer for one huge call must not stay for good.
  void settle() {
    constexpr int64_t kKeep = int64_t(1) << 24;  // floats: 64 MB
    if (size_ <= kKeep) return;
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};

inline Scratch& thread_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

}  // namespace autoflip
