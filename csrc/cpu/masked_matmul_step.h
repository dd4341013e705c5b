// A whole step forward and back: activations to panels, products, and the gradient in the weight.
#pragma once
#include <omp.h>

#include "cpu/masked_matmul_grad.h"

namespace autoflip {
namespace {

// lanes of the panels that the products take; the gradient in w walks rows one by one whatever they do
AF_INLINE int64_t lanes_of(const Orders& orders) { return orders.groups.rows ? kLanes : kAloneLanes; }

// Whether there are panels enough to be dealt to threads as wholes.
AF_INLINE bool several(int64_t n, int64_t lanes, int threads) {
  const int64_t count = ceil_div(n, lanes);
  return count > 1 && (count % threads == 0 || count >= 4 * threads);
}

// Whether panels are made, used and forgotten one by one: what a thread writes and reads then stays in its
// second-level cache. Not where panels share what is read of a large weight and that is more than they are.
AF_INLINE bool one_by_one(const Orders& orders, int64_t n, int threads) {
  const Lists& l = orders.lists;
  if (!several(n, lanes_of(orders), threads)) return false;
  return l.rows * l.cols <= kLarge || (!orders.groups.rows && 3 * kept(l) < kAloneLanes * (l.rows + l.cols));
}

// floats of the sums of dw at all cells
AF_INLINE int64_t kept_padded(const Lists& l) {
  return kept(l) + kWide * (l.rows * ceil_div(l.cols, l.chunk) + 2);
}
// Whether sums of all of dw are kept between panels, rather than all panels for one cell after the other.
AF_INLINE bool sums_stay(const Orders& orders, int64_t n, int threads) {
  const Lists& l = orders.lists;
  return threads == 1 && n > kAloneLanes && kept(l) <= kAloneLanes * (l.rows + l.cols);
}

// visit(first sample, samples, where its panels go: behind those of so many samples, threads) for each panel,
// by one thread, or for all
template <class Visit>
void each_panel(int64_t n, int64_t lanes, bool alone, int threads, const Visit& visit) {
  if (!alone) return visit(0, n, 0, threads);
  const int64_t count = ceil_div(n, lanes);
  deal(count, threads, [&](int64_t i) AF_LAMBDA {
    const Panel p = panel(i, n, lanes);
    visit(p.begin, p.count, count == threads ? p.begin : threads > 1 ? omp_get_thread_num() * lanes : 0, 1);
  });
}

int64_t forward_scratch(const Orders& orders, int64_t n) {
  return padded(n) * orders.lists.cols + (packs(orders) ? kept(orders.lists) : 0);
}
// past the end of a row of a narrow chunk the gradient in w looks up columns of another chunk
int64_t backward_scratch(const Orders& orders, int64_t n) {
  return padded(n) * (orders.lists.rows + orders.lists.cols) + kMaxChunk * kAloneLanes +
         (packs(orders) ? 2 * kept(orders.lists) : 0) + (n > kAloneLanes ? kept_padded(orders.lists) : 0);
}

void forward(const Orders& orders, const float* w, const float* x, int64_t n, const float* bias, bool relu,
             float* y, float* values, float* scratch, int threads) {
  const Lists& lists = orders.lists;
  if (packs(orders)) {
    if (!values) values = scratch + padded(n) * lists.cols;
    pack_values(lists, w, values, threads);
  }
  const auto visit = [&](int64_t begin, int64_t count, int64_t place, int workers) {
    float *to = y + begin * lists.rows, *panels = scratch + place * lists.cols;
    to_panels(x + begin * lists.cols, count, lists.cols, panels, workers, lanes_of(orders));
    if (orders.groups.rows)
      return product(orders.groups, {w, lists.cols, 1, false}, panels, count, bias, relu, to, workers);
    if (!packs(orders)) return product(lists, w, kRows, panels, count, bias, relu, to, workers);
    product(lists, values, kPacked, panels, count, bias, relu, to, workers);
  };
  each_panel(n, lanes_of(orders), one_by_one(orders, n, threads), threads, visit);
}

// dx from the panels of dy; values, turned: the kept weights in the two orders, where they are copied
void gradient_in_x(const Orders& orders, const float* w, const float* values, const float* turned,
                   const float* panels, int64_t n, float* dx, int threads) {
  const Lists &lists = orders.lists, &back = orders.columns;
  if (orders.back.rows)
    return product(orders.back, {w, 1, lists.cols, false}, panels, n, nullptr, false, dx, threads);
  if (orders.groups.rows) return product_back(orders.groups, w, panels, n, dx, threads);
  if (!packs(orders)) {
    if (back.rows) return product(back, w, kColumns, panels, n, nullptr, false, dx, threads);
    return product_back(lists, w, kRows, panels, n, dx, threads);
  }
  if (!back.rows) return product_back(lists, values, kPacked, panels, n, dx, threads);
  product(back, turned, kPacked, panels, n, nullptr, false, dx, threads);
}

void backward(const Orders& orders, const float* w, const float* values, const float* dy, const float* x,
              int64_t n, float* dx, float* dw, float* db, float* scratch, int threads) {
  const Lists& lists = orders.lists;
  if (db) sum_samples(dy, n, lists.rows, db);
  float* x_panels = scratch + padded(n) * lists.rows;
  float* room = x_panels + padded(n) * lists.cols + kMaxChunk * kAloneLanes;
  float* turned = room + kept(lists);
  float* sums = room + (packs(orders) ? 2 * kept(lists) : 0);
  if (dx && packs(orders) && !orders.groups.rows && !orders.back.rows) {
    if (!values) {
      pack_values(lists, w, room, threads);
      values = room;
    }
    if (orders.columns.rows) turn_values(orders.columns, orders.place, values, turned, threads);
  }
  const bool alone = one_by_one(orders, n, threads), stay = sums_stay(orders, n, threads);
  const bool same = lanes_of(orders) == kAloneLanes, together = dx && dw && alone && stay && same;
  const int64_t cells = ceil_div(lists.rows, lists.block) * ceil_div(lists.cols, lists.chunk);
  if (dx)
    each_panel(n, lanes_of(orders), alone, threads,
               [&](int64_t begin, int64_t count, int64_t place, int workers) {
                 float* panels = scratch + place * lists.rows;
                 to_panels(dy + begin * lists.rows, count, lists.rows, panels, workers, lanes_of(orders));
                 gradient_in_x(orders, w, values, turned, panels, count, dx + begin * lists.cols, workers);
                 if (!together) return;
                 to_panels(x + begin * lists.cols, count, lists.cols, x_panels, workers, kAloneLanes);
                 sample_panel(lists, panels, x_panels, count, begin == 0, sums);
               });
  if (!dw) return;
  if (!together)
    each_panel(n, kAloneLanes, stay, threads, [&](int64_t begin, int64_t count, int64_t, int workers) {
      if (!dx || !same || alone || stay)  // else dx has left the panels of all samples
        to_panels(dy + begin * lists.rows, count, lists.rows, scratch, workers, kAloneLanes);
      to_panels(x + begin * lists.cols, count, lists.cols, x_panels, workers, kAloneLanes);
      if (stay) sample_panel(lists, scratch, x_panels, count, begin == 0, sums);
    });
  if (!stay)
    return deal(cells, threads,
                [&](int64_t t) AF_LAMBDA { sample_tile(lists, t, scratch, x_panels, n, dw); });
  const float* from = sums;
  for (int64_t t = 0; t < cells; ++t) from = spread_cell(lists, t, from, dw);
}

}  // namespace
}  // namespace autoflip
