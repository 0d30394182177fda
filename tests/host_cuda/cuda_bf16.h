// bfloat16 on the host.
#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t u = static_cast<uint32_t>(value.bits) << 16;
  float out;
  std::memcpy(&out, &u, sizeof out);
  return out;
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  uint32_t u;
  std::memcpy(&u, &value, sizeof u);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return {static_cast<uint16_t>(value != value ? 0x7fff : rounded)};
}
