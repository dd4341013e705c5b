// Rows of a batch dealt to its samples by their weights: curvature/deal.py says how.
#pragma once
#include <cstdint>

namespace autoflip {

// A sample's due is budget * weight / sum, at most `most`, a power of two. From one on it gets the power of
// two below; else a row where the running sum of such dues, begun at `chance`, passes a whole number.
// Heaviest first. All arrays hold samples * most entries; returns how many rows there are.
int64_t deal_rows(const double* weight, int64_t samples, double budget, int64_t most, double chance,
                  int64_t* sample, int64_t* turn, double* scale);

}  // namespace autoflip
