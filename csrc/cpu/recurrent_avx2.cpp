#include "cpu/recurrent_impl.h"

namespace autoflip {
extern const RecurrentCell recurrent_avx2 = {lstm_forward, lstm_backward, gru_forward, gru_backward};
}
