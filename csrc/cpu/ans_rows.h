// Rows of 32 lanes of the entropy stage, 16 lanes a vector: the same bytes as the loops beside which they are
// called.
#pragma once
#include <cstdint>

namespace autoflip {

struct AnsLanes {
  uint32_t *states, *tables;        // 32 each; where a lane's class begins among the slots
  const uint32_t *slots, *offsets;  // offsets: by the byte that is known
  const uint8_t* companion;         // or null: the byte before
};

// Reads whole rows from the first on while `from` has words for them; returns how many.
int64_t ans_decode_rows(const AnsLanes& lanes, int64_t rows, const uint8_t*& from, const uint8_t* end,
                        uint8_t* out);

// Writes rows from the last one down before `end`, and returns the first that it wrote. packed: start and
// frequency << 12, at offsets[known byte] + symbol; offsets: 256 times the class.
int64_t ans_encode_rows(uint32_t* states, const uint32_t* packed, const uint32_t* offsets, const uint8_t* raw,
                        const uint8_t* companion, int64_t rows, uint8_t*& end);

}  // namespace autoflip
