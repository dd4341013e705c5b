// libFuzzer on the delta kernels: any bytes into every decoder, any floats through every encoder, at all
// instruction levels side by side. Buffers are of exact size, so that AddressSanitizer sees the first byte
// past them. Built and run by test_fuzz_core.py; by hand see there.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/ans.h"
#include "cpu/delta.h"
#include "cpu/huffman.h"

using autoflip::DeltaCoding;
using autoflip::DeltaKernels;

namespace {

std::vector<const DeltaKernels*> tables() {
  std::vector<const DeltaKernels*> out{&autoflip::kDeltaBase};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2")) out.push_back(&autoflip::kDeltaAvx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    out.push_back(&autoflip::kDeltaAvx512);
#endif
  return out;
}

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "broken: %s\n", what);
  std::abort();
}

// Memory of exactly n elements; never null, as the kernels' callers promise.
template <class T>
struct Exact {
  explicit Exact(int64_t n) : size(n), data(static_cast<T*>(std::calloc(size_t(n) + (n == 0), sizeof(T)))) {}
  ~Exact() { std::free(data); }
  Exact(const Exact&) = delete;
  Exact& operator=(const Exact&) = delete;
  bool same(const Exact& other) const { return !std::memcmp(data, other.data, size_t(size) * sizeof(T)); }
  int64_t size;
  T* data;
};

struct Input {
  const uint8_t* data;
  size_t left;
  uint32_t number(uint32_t limit) {
    uint32_t x = 0;
    const size_t n = left < 4 ? left : 4;
    if (n) std::memcpy(&x, data, n);
    data += n, left -= n;
    return x % limit;
  }
};

void decode_index(Input in, bool rice) {
  const int64_t n = in.number(5000), kept = in.number(uint32_t(n) + 1);
  const int k = int(in.number(32));
  Exact<uint8_t> bytes(int64_t(in.left));
  if (in.left) std::memcpy(bytes.data, in.data, in.left);
  const int64_t num_words = (n + 63) / 64;
  Exact<uint64_t> first(num_words);
  int64_t first_used = 0;
  for (const DeltaKernels* t : tables()) {
    Exact<uint64_t> words(num_words);
    const int64_t used = rice ? t->rice_decode(bytes.data, bytes.size, n, kept, k, words.data)
                              : t->varint_decode(bytes.data, bytes.size, n, kept, words.data);
    expect(used <= bytes.size, "reads no more than there is");
    if (t == &autoflip::kDeltaBase) {
      first_used = used;
      std::memcpy(first.data, words.data, size_t(num_words) * 8);
    }
    expect(used == first_used && words.same(first), "every level decodes alike");
    if (used < 0) continue;
    expect(t->count(words.data, num_words) == kept, "exactly kept entries");
    if (n % 64 && num_words) expect(!(words.data[num_words - 1] >> n % 64), "no entry past the end");
    if (rice) {
      const int64_t bits = t->rice_bits(words.data, num_words, k), skipped = n - kept;
      const int64_t bound = (skipped >> k) + kept * (1 + k) +
                            31 * (kept < skipped / (24LL << k) ? kept : skipped / (24LL << k));
      expect(bits <= bound, "the writer's bound holds");
      Exact<uint8_t> again(bound / 8 + 8);
      expect(t->rice_encode(words.data, num_words, k, again.data) == (bits + 7) / 8, "rice_bits is exact");
      Exact<uint64_t> twice(num_words);
      expect(t->rice_decode(again.data, (bits + 7) / 8, n, kept, k, twice.data) == (bits + 7) / 8,
             "round trip");
      expect(twice.same(words), "round trip");
    } else {
      Exact<uint8_t> again(kept + (n - kept) / 128 + autoflip::kVarintSlack);
      expect(t->varint_encode(words.data, num_words, 0, again.data) == used, "one form only");
      expect(!std::memcmp(again.data, bytes.data, size_t(used)), "one form only");
    }
  }
}

// Codes that are 0 left out: each block keeps one or more, and what is left decodes to the same numbers.
void without_zeros(const DeltaKernels& t, DeltaCoding c, const uint64_t* words, int64_t n, int64_t kept,
                   const Exact<float>& want) {
  const int64_t bytes = c.kind == autoflip::kInt4 ? (kept + 1) / 2 : kept, blocks = (kept + 255) / 256;
  Exact<uint8_t> codes(bytes), counts(blocks);
  Exact<uint64_t> every((n + 63) / 64), stays((kept + 63) / 64), entries((n + 63) / 64);
  std::memcpy(codes.data, c.streams[0], size_t(bytes));
  const int64_t left = t.drop_zeros(c.kind, codes.data, kept, stays.data, counts.data);
  Exact<int64_t> starts(blocks + 1);
  for (int64_t b = 0; b < blocks; ++b) starts.data[b + 1] = starts.data[b] + counts.data[b] + 1;
  expect(starts.data[blocks] == left && t.count(stays.data, stays.size) == left,
         "counts are those of what stays");
  for (int64_t i = 0; i < n; ++i) every.data[i / 64] |= 1ULL << i % 64;
  t.within(words ? words : every.data, every.size, stays.data, kept, 0, entries.data);
  Exact<uint8_t> exact(c.kind == autoflip::kInt4 ? (left + 1) / 2 : left);
  std::memcpy(exact.data, codes.data, size_t(exact.size));
  c.streams[0] = exact.data, c.starts = starts.data, c.blocks = blocks;
  expect(t.valid(c, left), "what is left is valid");
  Exact<float> out(n), sum(n);
  t.decode(c, entries.data, n, 0, false, out.data);
  t.decode_add(c, entries.data, n, 0, 1.0f, sum.data);
  for (int64_t i = 0; i < n; ++i)  // -0 is 0
    expect(out.data[i] == want.data[i] && sum.data[i] == want.data[i], "the same numbers");
}

void stream(Input in) {
  const int64_t n = in.number(1000) * (in.number(2) ? 1 : 13);
  const int kind = int(in.number(4));
  const bool masked = in.number(2), with_base = in.number(2), find = masked && !with_base && in.number(2);
  const int64_t num_words = (n + 63) / 64;
  Exact<float> x(n), base(n);
  Exact<uint64_t> words(num_words);
  for (int64_t i = 0; i < n; ++i) {
    const uint8_t* at = in.data;
    uint8_t four[4] = {uint8_t(i), uint8_t(i * 7), 0, 0x3f};
    for (int b = 0; b < 4; ++b)
      if (in.left) four[b] = at[size_t(4 * i + b) % in.left];
    std::memcpy(&x.data[i], four, 4);
    base.data[i] = float(i % 5);
  }
  for (int64_t w = 0; w < num_words; ++w) {
    uint64_t word = in.left ? in.data[size_t(w) % in.left] * 0x0101010101010101ULL ^ uint64_t(w) << 17 : 0;
    if (64 * (w + 1) > n && n % 64) word &= (1ULL << n % 64) - 1;
    words.data[w] = word;
  }
  if (find) autoflip::kDeltaBase.pack_nonzero(x.data, n, words.data);
  const int64_t kept = masked ? autoflip::kDeltaBase.count(words.data, num_words) : n;
  const int64_t bytes = kind == autoflip::kInt4 ? (kept + 1) / 2 : kept, blocks = (kept + 255) / 256;
  const int levels = kind == autoflip::kInt4 ? 1 + int(kept % 7) : 127 - int(kept % 100);
  Exact<uint8_t> first(4 * bytes);
  Exact<float> first_out(n);
  bool first_bad = false;
  for (const DeltaKernels* t : tables()) {
    Exact<uint8_t> p0(bytes), p1(bytes), p2(bytes), p3(bytes);
    Exact<float> scales(blocks), loose(510), out(n), sum(n);
    DeltaCoding c{kind, {p0.data, p1.data, p2.data, p3.data}, scales.data, levels, 1e36f, {3, 7, ~0u, 0}};
    Exact<uint64_t> found(find ? num_words : 0);
    const uint64_t* w = find ? found.data : masked ? words.data : nullptr;
    const bool bad = t->encode(x.data, with_base ? base.data : nullptr, w, n, 0, c, loose.data,
                               find ? found.data : nullptr);
    if (t == &autoflip::kDeltaBase) first_bad = bad;
    expect(bad == first_bad, "every level sees a bad entry");
    if (bad) continue;
    if (find) expect(found.same(words), "every level finds what is not zero");
    if (kind >= autoflip::kInt8 && kept % 256) t->code_values(loose.data, kept % 256, kept / 256 * 256, c);
    expect(t->valid(c, kept), "what encode writes is valid");
    t->decode(c, w, n, 0, false, out.data);
    t->decode_add(c, w, n, 0, 0.5f, sum.data);
    for (int b = 0; b < 4; ++b) {
      uint8_t* to = first.data + b * bytes;
      if (t == &autoflip::kDeltaBase && bytes) std::memcpy(to, c.streams[b], size_t(bytes));
      expect(!bytes || !std::memcmp(to, c.streams[b], size_t(bytes)), "every level writes alike");
    }
    if (t == &autoflip::kDeltaBase) std::memcpy(first_out.data, out.data, size_t(n) * 4);
    if (kind >= autoflip::kInt8 && kept) without_zeros(*t, c, masked ? w : nullptr, n, kept, out);
    expect(out.same(first_out), "every level reads alike");
    for (int64_t i = 0; i < n; ++i) {
      const bool in_mask = !masked || words.data[i / 64] >> i % 64 & 1;
      expect(in_mask || out.data[i] == 0, "nothing outside the mask");
      expect(sum.data[i] == 0.5f * out.data[i], "decode_add adds what decode writes");
      if (kind == autoflip::kFp32 && in_mask)
        expect(out.data[i] == (with_base ? x.data[i] - base.data[i] : x.data[i]), "fp32 is exact");
    }
  }
}

// Streams nobody wrote: valid() decides, decoding stays inside its buffers and finite when it says yes.
void hostile(Input in) {
  const int kind = int(in.number(4));
  const int64_t kept = in.number(700), n = kept + in.number(200);
  const int64_t bytes = kind == autoflip::kInt4 ? (kept + 1) / 2 : kept;
  Exact<uint8_t> p[4]{Exact<uint8_t>(bytes), Exact<uint8_t>(bytes), Exact<uint8_t>(bytes),
                      Exact<uint8_t>(bytes)};
  for (auto& plane : p)
    for (int64_t i = 0; i < bytes; ++i) plane.data[i] = in.left ? in.data[size_t(i) % in.left] : 0;
  Exact<float> scales((kept + 255) / 256), out(n);
  for (int64_t i = 0; i < scales.size; ++i) scales.data[i] = 1e30f;
  Exact<uint64_t> mask((n + 63) / 64), ranks((kept + 63) / 64), within(mask.size);
  for (int64_t i = 0; i < kept; ++i) mask.data[i / 64] |= 1ULL << i % 64;
  for (int64_t i = 0; i < kept; ++i)
    ranks.data[i / 64] |= uint64_t(bytes && p[0].data[i % bytes] & 1) << i % 64;
  bool first = false;
  for (const DeltaKernels* t : tables()) {
    DeltaCoding c{kind, {p[0].data, p[1].data, p[2].data, p[3].data}, scales.data, 0, 1e36f, {}};
    const bool valid = t->valid(c, kept);
    if (t == &autoflip::kDeltaBase) first = valid;
    expect(valid == first, "every level judges alike");
    t->decode(c, mask.data, n, 0, false, out.data);
    for (int64_t i = 0; valid && i < n; ++i)
      expect(out.data[i] - out.data[i] == 0, "valid streams are finite");
    t->within(mask.data, mask.size, ranks.data, kept, 0, within.data);
    expect(t->count(within.data, mask.size) == t->count(ranks.data, ranks.size), "every rank has its entry");
  }
}

// The entropy stage: any bytes into its decoder, and any bytes through both.
void lanes(Input in) {
  const bool beside = in.number(2);
  const int64_t n = in.number(3000) * (in.number(4) ? 1 : 16);
  const int key = int(in.number(3));
  Exact<uint8_t> raw(n), companion(n), out(n), coded(int64_t(in.left));
  for (int64_t i = 0; i < n; ++i) {
    raw.data[i] = in.left ? uint8_t(in.data[size_t(i * i / 7) % in.left] + i % 3) : uint8_t(i);
    companion.data[i] = uint8_t(raw.data[i] / 3);
  }
  if (in.left) std::memcpy(coded.data, in.data, in.left);
  const uint8_t* known = beside ? companion.data : nullptr;
  autoflip::ans_decode(coded.data, coded.size, known, n, out.data);
  if (!n) return;
  Exact<uint8_t> room(n + n / 2 + autoflip::kAnsHeader + 64);
  const int64_t start = autoflip::ans_encode(raw.data, n, known, key, INT64_MAX, room.data);
  expect(start >= 0, "the room is enough");
  Exact<uint8_t> part(room.size - start);
  std::memcpy(part.data, room.data + start, size_t(part.size));
  expect(!autoflip::ans_decode(part.data, part.size, known, n, out.data) && out.same(raw), "round trip");
  if (in.left) part.data[in.data[0] % part.size] ^= uint8_t(1 + in.data[in.left - 1] % 255);
  autoflip::ans_decode(part.data, part.size, known, n, out.data);
  if (n < autoflip::kHuffmanLeast) return;
  Exact<uint8_t> frame(autoflip::huffman_bound(n));  // zstd reads it in test_entropy.py
  const int64_t size = autoflip::huffman_encode(raw.data, n, INT64_MAX, 1, frame.data);
  expect(size > 0 && size <= frame.size, "the frame fits");
  Exact<uint8_t> sent(size), read(n);
  std::memcpy(sent.data, frame.data, size_t(size));
  expect(autoflip::huffman_decode(sent.data, size, n, 1, read.data) && read.same(raw), "the frame returns");
  for (size_t i = 0; i + 1 < in.left && i < 8; i += 2)  // most of them among the heads and the table
    sent.data[(i % 4 ? in.data[i] : in.data[i] * 37) % size] ^= in.data[i + 1];
  autoflip::huffman_decode(sent.data, size, n, 1, read.data);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (!size) return 0;
  const Input in{data + 1, size - 1};
  switch (data[0] % 5) {
    case 0:
      decode_index(in, true);
      break;
    case 1:
      decode_index(in, false);
      break;
    case 2:
      stream(in);
      break;
    case 3:
      hostile(in);
      break;
    default:
      lanes(in);
  }
  return 0;
}
