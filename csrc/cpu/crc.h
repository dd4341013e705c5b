// CRC-32 of zlib and Ethernet (reflected polynomial 0xEDB88320).
#pragma once
#include <cstdint>

namespace autoflip {

// Whether this CPU multiplies without carries (PCLMULQDQ); nothing else here is faster than zlib.
bool has_fast_crc();

// The checksum of what `crc` covers with `bytes` more behind it; needs has_fast_crc().
uint32_t crc32(uint32_t crc, const uint8_t* data, int64_t bytes);

}  // namespace autoflip
