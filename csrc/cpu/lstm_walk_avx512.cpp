#include "cpu/lstm_walk_impl.h"

namespace autoflip {
const LstmWalk lstm_walk_avx512 = {lstm_forward<Floats>, lstm_back<Floats, float>};
}
