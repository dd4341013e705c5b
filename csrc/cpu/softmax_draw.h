// Softmax's second derivative at the output of a network, scale (diag p - p p^T), row by row: a draw by its
// Cholesky factor with the likeliest class first (Tanabe and Sagae, 1992), that factor, and its trace. A few
// hundred rows of a few classes: one pass in double precision takes as long as one call of a tensor library,
// which would make twenty.
#pragma once
#include <cstdint>

namespace autoflip {

// v[n, order[i]] = (S signs[n])[i], S S^T = scale[n] (diag p - p p^T) of f's row n sorted by `order`, largest
// first
void softmax_draw(const float* f, const float* scale, const float* signs, float* v, int64_t rows,
                  int64_t classes);
// v[c, n, order[i]] = S[i, c] for the columns c but the last, which is zero
void softmax_columns(const float* f, const float* scale, float* v, int64_t rows, int64_t classes);
// Cholesky's factor with classes as they come, for S's columns times J(c): own[c] (J(c) - mean), the mean of
// the classes before c by their p, which step[c] (J(c) - mean) moves on. All (rows, classes) but likeliest,
// (rows); diagonal = scale (p - p^2).
void softmax_steps(const float* f, const float* scale, float* own, float* step, float* diagonal,
                   int64_t* likeliest, int64_t rows, int64_t classes);
// out[n] = scale[n] (1 - sum p^2)
void softmax_weight(const float* f, const float* scale, double* out, int64_t rows, int64_t classes);

// How rows are dealt (cpu/deal.h); `alike` is a share of the samples.
struct Deal {
  double budget;
  int64_t most;
  double alike, chance;
};
// Rows dealt by softmax_weight: sample[r], and v[r] = softmax_draw of it with its signs (times those of a
// Hadamard matrix's row, orthogonal to the sample's other rows) by the row's scale. Room for `budget` rows
// and one of each sample. Returns how many there are: 0 where more than `alike` of the samples carry the
// weight, or none does.
int64_t softmax_deal(const float* f, const float* scale, const float* signs, int64_t samples, int64_t classes,
                     const Deal& how, int64_t* sample, float* v);

}  // namespace autoflip
