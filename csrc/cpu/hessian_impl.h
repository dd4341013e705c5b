// D[o, k] = sum_qn (sum_p d[q, n, o, p] u[n, p, k])^2 without any sample's gradient, or all patches, in
// memory.
//
// Work     a block of samples at a time. Phase 1, parallel over samples: patches as rows u[p, :], copied from
// a
//          padded channels-last image or, where vectors fit into a kernel row, read there; and d's non-zero
//          positions gathered. Phase 2, parallel over tiles of D: R rows of d x 4 vectors of k stay in
//          registers over all positions, are squared there and added to D. A tile of D has one owner and
//          samples come in order: the bits do not depend on the number of threads.
// Zeros    after ReLU and max-pooling most of d is zero. R rows (factors of one output, or neighbouring
// outputs)
//          share the union of their live positions; rows that share few run one by one.
// Bound    with R = 6 the inner loop does 6 multiply-adds a load: compute bound from L2.
#pragma once
#include <omp.h>

#include <cstring>
#include <memory>

#include "cpu/hessian.h"
#include "cpu/hessian_plan.h"
#include "cpu/hessian_tile.h"

namespace {

using autoflip::SquaresShape;

// Which of E entries are not zero: bits of words, or bytes. `mark` adds a row's (nothing else is set where
// `only`) and counts them, `count` counts all that are marked, `list` writes where they are, `pick` a row's
// values there.
#if defined(__AVX512F__)
using Alive = uint16_t;

inline __mmask16 first_of(int64_t n) { return static_cast<__mmask16>(n < W ? (1u << n) - 1 : 0xFFFFu); }

inline int64_t mark(const float* v, int64_t E, Alive* alive, bool only) {
  int64_t count = 0;
  for (int64_t e = 0; e < E; e += W) {
    __mmask16 in = first_of(E - e);
    __mmask16 on =
        _mm512_mask_cmp_ps_mask(in, _mm512_maskz_loadu_ps(in, v + e), _mm512_setzero_ps(), _CMP_NEQ_UQ);
    alive[e / W] = static_cast<Alive>(only ? on : alive[e / W] | on);
    count += __builtin_popcount(on);
  }
  return count;
}

inline int64_t count(const Alive* alive, int64_t E) {
  int64_t total = 0;
  for (int64_t e = 0; e < E; e += W) total += __builtin_popcount(alive[e / W]);
  return total;
}

inline void list(const Alive* alive, int64_t E, int32_t* to) {
  __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t e = 0; e < E; e += W, at = _mm512_add_epi32(at, _mm512_set1_epi32(W))) {
    int n = __builtin_popcount(alive[e / W]);
    _mm512_mask_storeu_epi32(to, first_of(n), _mm512_maskz_compress_epi32(alive[e / W], at));
    to += n;
  }
}

inline void pick(const float* v, const Alive* alive, int64_t E, float* to) {
  for (int64_t e = 0; e < E; e += W) {
    __mmask16 on = alive[e / W];
    int n = __builtin_popcount(on);
    _mm512_mask_storeu_ps(to, first_of(n), _mm512_maskz_compress_ps(on, _mm512_maskz_loadu_ps(on, v + e)));
    to += n;
  }
}
#else
using Alive = unsigned char;

inline int64_t mark(const float* v, int64_t E, Alive* alive, bool only) {
  int64_t count = 0;
  for (int64_t e = 0; e < E; ++e) {
    Alive on = v[e] != 0.f;
    alive[e] = only ? on : alive[e] | on;
    count += on;
  }
  return count;
}

inline int64_t count(const Alive* alive, int64_t E) {
  int64_t total = 0;
  for (int64_t e = 0; e < E; ++e) total += alive[e];
  return total;
}

inline void list(const Alive* alive, int64_t E, int32_t* to) {
  int64_t n = 0;
  for (int64_t e = 0; e < E; ++e)
    if (alive[e]) to[n++] = static_cast<int32_t>(e);
}

inline void pick(const float* v, const Alive* alive, int64_t E, float* to) {
  int64_t n = 0;
  for (int64_t e = 0; e < E; ++e)
    if (alive[e]) to[n++] = v[e];
}
#endif

// Find a team's live entries; row(r) is row r's values, at: the positions of a scattered row's entries,
// offsets: where patches begin that are read in place. Returns the multiply-adds per column of D.
template <class RowOf>
int64_t gather(const Plan& plan, const Plan::Team& team, const Scratch& s, const int64_t* at,
               const int32_t* offsets, RowOf row) {
  int64_t E = plan.entries, live[kMaxRows], alone = 0, shared = 0;
  Alive* on = reinterpret_cast<Alive*>(s.alive);
  for (int64_t r = 0; r < team.rows; ++r) alone += live[r] = mark(row(team.first + r), E, on, r == 0);
  shared = count(on, E);
  Plan::Row* rows = s.rows + team.first;
  // few columns: finding the zeros costs more than multiplying by them
  bool dense =
      !at && (plan.ld <= kTile ? shared > 0 : 10 * shared >= 9 * E && 2 * alone >= shared * team.rows);
  if (dense) {
    for (int64_t r = 0; r < team.rows; ++r) rows[r] = {row(team.first + r), offsets, E};
    return E * team.rows;
  }
  // a row by itself does one multiply-add a load, in a team one load serves all rows
  bool split = team.rows > 1 && 2 * alone < shared * team.rows;
  if (!split) list(on, E, s.lists + team.first * E);
  for (int64_t r = 0; r < team.rows; ++r) {
    const float* v = row(team.first + r);
    int32_t* where = s.lists + (team.first + (split ? r : 0)) * E;
    if (split) {
      mark(v, E, on, true);
      list(on, E, where);
    }
    float* to = s.values + (team.first + r) * E;
    rows[r] = {to, where, split ? live[r] : shared};
    pick(v, on, E, to);
  }
  for (int64_t r = 0; r < (at || offsets ? split ? team.rows : 1 : 0); ++r) {  // from entries to patches
    int32_t* list = s.lists + (team.first + r) * E;
    const int64_t* where = at ? at + (team.first + r) / plan.factors * E : nullptr;
    for (int64_t j = 0; j < rows[r].count; ++j) {
      int64_t p = where ? where[list[j]] : list[j];
      list[j] = offsets ? offsets[p] : static_cast<int32_t>(p);
    }
  }
  return split ? alone : shared * team.rows;
}

void multiply(const Plan& plan, const Plan::Team& team, const Scratch& s, float* D, int64_t begin,
              int64_t end) {
  int64_t i = plan.in_place ? begin / plan.run : 0, ld = plan.in_place ? 1 : plan.ld;
  const float* u = plan.in_place
                       ? s.image + team.group * plan.image_group + i * plan.step + begin - i * plan.run
                       : s.u + team.group * plan.positions * plan.ld + begin;
  const Plan::Row* rows = s.rows + team.first;
  float* out[kMaxRows];
  for (int64_t r = 0; r < team.rows; ++r) out[r] = D + (team.first + r) / plan.factors * plan.ld + begin;
  if (team.rows == 1 || rows[1].list == rows[0].list) {
    if (rows->count) columns<Into::kSquares>(team.rows, u, ld, rows, out, end - begin);
    return;
  }
  for (int64_t r = 0; r < team.rows; ++r)
    if (rows[r].count) columns<Into::kSquares>(1, u, ld, rows + r, out + r, end - begin);
}

// fill(sample, scratch) makes u; row(sample, r) is a row of d. D is [outputs, ld] at scratch's
// beginning.
template <class Fill, class RowOf>
int64_t accumulate(const Plan& plan, int64_t samples, const int64_t* at, const int32_t* offsets,
                   float* scratch, int threads, Fill fill, RowOf row) {
  float* D = scratch;
  float* blocks = D + plan.outputs * plan.ld;
  std::memset(D, 0, sizeof(float) * plan.outputs * plan.ld);
  int64_t size = plan.block(samples, threads), items = plan.tiles() * plan.owners;
  int64_t ran = 0;
#pragma omp parallel num_threads(threads) reduction(+ : ran) if (threads > 1)
  {
    int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
    for (int64_t from = 0; from < samples; from += size) {
      int64_t to = least(samples, from + size);
#pragma omp for schedule(static)
      for (int64_t n = from; n < to; ++n) {
        Scratch s(blocks + (n - from) * plan.sample_floats(), plan);
        fill(n, s);
        for (int64_t t = 0; t < plan.teams(); ++t)
          ran += gather(plan, plan.team(t), s, at ? at + n * plan.outputs * plan.entries : nullptr, offsets,
                        [&](int64_t r) { return row(n, r); });
      }
      // not `omp for`: a thread keeps its tiles of D and walks the samples outside, so patches stay in its
      // cache
      for (int64_t n = from; n < to; ++n) {
        Scratch s(blocks + (n - from) * plan.sample_floats(), plan);
        for (int64_t i = items * me / all; i < items * (me + 1) / all; ++i) {
          int64_t t = i / plan.owners, owner = i % plan.owners, wide = plan.in_place ? plan.run : plan.ld;
          int64_t left = t % plan.tiles_per_run() * kTile, first = t / plan.tiles_per_run() * wide;
          int64_t begin = first + left, end = first + least(wide, left + kTile);
          for (int64_t part = 0; part < plan.parts; ++part)
            multiply(plan, plan.team(owner * plan.parts + part), s, D, begin, end);
        }
      }
#pragma omp barrier
    }
  }
  return ran * plan.columns;
}

inline Plan plan_of(const SquaresShape& c, bool scattered) {
  int64_t pixels = c.channels * (c.height + 2 * c.pad_h) * (c.width + 2 * c.pad_w);
  return Plan(c, pixels, scattered);
}

// One group's image as [H + 2 pad, W + 2 pad, C].
void channels_last(const float* x, const SquaresShape& c, float* image) {
  int64_t C = c.channels / c.groups, H = c.height, Wd = c.width, wide = Wd + 2 * c.pad_w;
  if (c.pad_h || c.pad_w) std::memset(image, 0, sizeof(float) * (H + 2 * c.pad_h) * wide * C);
  for (int64_t i = 0; i < H; ++i)
    for (int64_t ch = 0; ch < C; ++ch) {
      const float* from = x + (ch * H + i) * Wd;
      float* to = image + ((i + c.pad_h) * wide + c.pad_w) * C + ch;
      for (int64_t j = 0; j < Wd; ++j) to[j * C] = from[j];
    }
}

// From it rows u[p, (i, j, c)]: copies of kernel_width * C floats.
void patches(const SquaresShape& c, const Plan& plan, const float* image, float* u) {
  int64_t C = c.channels / c.groups, wide = c.width + 2 * c.pad_w;
  int64_t run = c.dilation_w == 1 ? c.kernel_width * C : C;
  for (int64_t p = 0; p < plan.positions; ++p) {
    int64_t top = p / c.out_width * c.stride_h, left = p % c.out_width * c.stride_w;
    float* to = u + p * plan.ld;
    for (int64_t i = 0; i < c.kernel_height; ++i)
      for (int64_t j = 0; j < c.kernel_width; j += c.dilation_w == 1 ? c.kernel_width : 1) {
        const float* from = image + ((top + i * c.dilation_h) * wide + left + j * c.dilation_w) * C;
        // whole vectors: what runs over is overwritten by the next copy, or zeroed below
        for (int64_t k = 0; k < run; k += W) store(to + k, load(from + k));
        to += run;
      }
    for (float* end = u + (p + 1) * plan.ld; to < end; ++to) *to = 0.f;
  }
}

int64_t squares(const float* const* d, const float* x, const int64_t* at, float* out, float* scratch,
                const SquaresShape& c, int threads) {
  Plan plan = plan_of(c, at);
  scratch = aligned(scratch);
  int64_t P = plan.positions, K = plan.columns, C = c.channels / c.groups, pixels = c.height * c.width;
  auto fill = [&](int64_t n, const Scratch& s) {
    for (int64_t g = 0; g < c.groups; ++g) {
      float* image = s.image + (plan.in_place ? g * plan.image_group : 0);
      channels_last(x + (n * c.channels + g * C) * pixels, c, image);
      if (!plan.in_place) patches(c, plan, image, s.u + g * P * plan.ld);
    }
  };
  std::unique_ptr<int32_t[]> offsets(plan.in_place ? new int32_t[P] : nullptr);
  for (int64_t p = 0; plan.in_place && p < P; ++p)
    offsets[p] = static_cast<int32_t>(
        (p / c.out_width * c.stride_h * (c.width + 2 * c.pad_w) + p % c.out_width * c.stride_w) * C);
  auto row = [&](int64_t n, int64_t r) {
    return d[r % c.factors] + (n * c.outputs + r / c.factors) * c.entries;
  };
  int64_t ran = accumulate(plan, c.samples, at, offsets.get(), scratch, threads, fill, row);
  int64_t taps = c.kernel_height * c.kernel_width;  // D's columns are (i, j, c), the weight's (c, i, j)
  for (int64_t o = 0; o < c.outputs; ++o)
    for (int64_t k = 0; k < K; ++k) out[o * K + k % C * taps + k / C] = scratch[o * plan.ld + k];
  return ran;
}

int64_t squares_scratch(const SquaresShape& c, int threads) {
  Plan scattered = plan_of(c, true), whole = plan_of(c, false);
  return most(scattered.scratch(c.samples, threads), whole.scratch(c.samples, threads)) + kAlign;
}

}  // namespace
