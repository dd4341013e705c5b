// How a sum of squares is cut: teams of rows that share registers, blocks of samples that share the cache.
#pragma once
#include "cpu/hessian.h"
#include "cpu/hessian_simd.h"

namespace {

constexpr int64_t kAlign = 16;    // floats; rows of u and D are padded to it
constexpr int64_t kTile = 4 * W;  // columns of D in registers
constexpr int64_t kBlockFloats =
    1 << 18;  // patches held at once, 1 MiB, unless one sample a thread needs more

inline int64_t padded(int64_t n) { return (n + kAlign - 1) / kAlign * kAlign; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

inline float* aligned(float* p) {
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(p) + 63) / 64 * 64);
}

// How rows of d (row = output * factors + factor) are grouped into teams that share registers: the factors of
// one output in `parts` teams, or `together` outputs with all their factors. An owner is what one thread adds
// to D.
struct Plan {
  int64_t factors, outputs, groups, positions, entries, columns, ld;
  int64_t parts, together, owners;
  int64_t image;  // floats that a sample's preparation needs
  // A kernel row of a patch, `run` floats, is one piece of a channels-last image: where vectors fit in,
  // patches are read there (`in_place`: a position's begins at its offset, the next kernel row `step` floats
  // on).
  bool in_place;
  int64_t run, step, image_group;

  // scattered: outputs have their values at different positions, so no two of them share a team
  Plan(const autoflip::SquaresShape& c, int64_t preparation, bool scattered)
      : factors(c.factors),
        outputs(c.outputs),
        groups(c.groups),
        positions(c.positions()),
        entries(c.entries),
        columns(c.columns()),
        ld(padded(c.columns())),
        image(padded(preparation) + kAlign),
        run(c.kernel_width * (c.channels / c.groups)),
        step(c.dilation_h * (c.width + 2 * c.pad_w) * (c.channels / c.groups)),
        image_group((c.height + 2 * c.pad_h) * (c.width + 2 * c.pad_w) * (c.channels / c.groups)) {
    in_place = c.dilation_w == 1 && run % kAlign == 0;
    parts = (factors + kMaxRows - 1) / kMaxRows;
    together = scattered ? 1 : most(1, kMaxRows / factors);
    owners = groups * owners_per_group();
  }
  int64_t owners_per_group() const { return (outputs / groups + together - 1) / together; }
  int64_t teams() const { return owners * parts; }
  int64_t patch_floats() const { return in_place ? 0 : padded(groups * positions * ld + kAlign); }
  int64_t tiles_per_run() const { return in_place ? (run + kTile - 1) / kTile : (ld + kTile - 1) / kTile; }
  int64_t tiles() const { return tiles_per_run() * (in_place ? columns / run : 1); }
  int64_t value_floats() const { return padded(outputs * factors * entries); }
  int64_t list_floats() const {
    return padded(outputs * factors * entries);
  }  // int32, at most one list a row
  int64_t row_bytes() const { return outputs * factors * static_cast<int64_t>(sizeof(Row)); }
  int64_t sample_floats() const {
    return patch_floats() + value_floats() + list_floats() + image + padded(row_bytes() / 4 + 1) +
           padded(entries / 4 + 1);
  }
  int64_t block(int64_t samples, int threads) const {
    return least(samples, most(threads, kBlockFloats / sample_floats()));
  }
  int64_t scratch(int64_t samples, int threads) const {
    return outputs * ld + block(samples, threads) * sample_floats() + kAlign;
  }

  struct Row {
    const float* values;  // at the live positions
    const int32_t* list;  // which these are; null: all
    int64_t count;
  };
  struct Team {
    int64_t first, rows, group;
  };
  Team team(int64_t t) const {
    int64_t owner = t / parts, part = t % parts, size = outputs / groups;
    int64_t g = owner / owners_per_group(), o = owner % owners_per_group() * together;
    int64_t rows = least(together, size - o) * factors, begin = part * rows / parts;
    return {(g * size + o) * factors + begin, (part + 1) * rows / parts - begin, g};
  }
};

struct Scratch {  // of one sample
  float *u, *values, *image;
  int32_t* lists;
  Plan::Row* rows;
  unsigned char* alive;

  Scratch(float* base, const Plan& plan)
      : u(base),
        values(u + plan.patch_floats()),
        image(values + plan.value_floats()),
        lists(reinterpret_cast<int32_t*>(image + plan.image)),
        rows(reinterpret_cast<Plan::Row*>(lists + plan.list_floats())),
        alive(reinterpret_cast<unsigned char*>(lists + plan.list_floats() +
                                               padded(plan.row_bytes() / 4 + 1))) {}
};

}  // namespace
