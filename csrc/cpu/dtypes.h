// The 16-bit formats, one number at a time. Rounding is to nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>

namespace midstream {

struct Half {
  std::uint16_t bits;
};

struct BFloat16 {
  std::uint16_t bits;
};

inline float from_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline std::uint32_t to_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float widen(float value) { return value; }

inline float widen(BFloat16 value) { return from_bits(std::uint32_t{value.bits} << 16); }

inline float widen(Half value) {
  const std::uint32_t sign = (value.bits & 0x8000u) << 16;
  const std::uint32_t exponent = (value.bits >> 10) & 0x1fu;
  const std::uint32_t mantissa = value.bits & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24, exact in fp32
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  const std::uint32_t rebased = exponent == 0x1fu ? 0xffu : exponent + 112u;  // 127 - 15
  return from_bits(sign | (rebased << 23) | (mantissa << 13));
}

inline float narrow(float value, float /*format*/) { return value; }

inline BFloat16 narrow(float value, BFloat16 /*format*/) {
  if (value != value) return {0x7fc0u};
  const std::uint32_t bits = to_bits(value);
  return {static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

inline Half narrow(float value, Half /*format*/) {
  const std::uint32_t bits = to_bits(value);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    magnitude = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    magnitude = 0x7c00u;  // 65520 and more round to infinity
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14 a half counts in steps of 2^-24, as floats from 0.5 to 1 do.
    magnitude = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    magnitude = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  }
  return {static_cast<std::uint16_t>(sign | magnitude)};
}

}  // namespace midstream
