#include "cpu/recurrent_impl.h"

namespace autoflip {
extern const RecurrentCell recurrent_base = {lstm_forward, lstm_backward, gru_forward, gru_backward};
}
