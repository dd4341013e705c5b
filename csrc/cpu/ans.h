// Entropy stage of the wire format: range asymmetric numeral systems (rANS) with static tables, in lanes that
// each hold a stretch of the bytes; the table of a byte is chosen by a class of what is known before it: the
// byte before, or a companion (docs/wire_format.md).
//
// Source: Duda, "Asymmetric numeral systems", arXiv:1311.2540; Giesen, "Interleaved entropy coders",
// arXiv:1402.3392.
#pragma once
#include <cstdint>

namespace autoflip {

constexpr int kAnsBits = 12, kAnsClasses = 16, kAnsLevels = 48;
// Lanes: one below kAnsShortest bytes, which keys from kAnsOne on announce (a lane's state is 4 bytes, which
// eight lanes win back in time from there on only), kAnsFew below kAnsLong, else kAnsMany.
constexpr int kAnsFew = 8, kAnsMany = 32, kAnsOne = 3;
constexpr int64_t kAnsShortest = 1 << 14, kAnsLong = 1 << 15;
constexpr int64_t kAnsHeader = 1 << 14;  // bytes: no header of a coded part is longer

// The order in which classes cut bytes: as int8, without the sign of a float's top byte, as they are.
enum AnsKey : int { kSigned = 0, kMagnitude = 1, kPlain = 2 };

enum AnsError : int64_t { kAnsShort = -1, kAnsTable = -2, kAnsTail = -3, kAnsState = -4 };

// Codes n bytes into `out`, which has room for n + n / 2 + kAnsHeader + 64 bytes; companion (n bytes) or
// null: the byte before. Returns where in `out` the coded part starts; it ends with the room. Where a sample
// tells of `limit` bytes or more, `out` is left alone, and what it tells is returned below zero.
int64_t ans_encode(const uint8_t* raw, int64_t n, const uint8_t* companion, int key, int64_t limit,
                   uint8_t* out);

// The other way, from hostile bytes into n; returns 0 or an AnsError.
int64_t ans_decode(const uint8_t* data, int64_t bytes, const uint8_t* companion, int64_t n, uint8_t* out);

}  // namespace autoflip
