// Score and norm in plain C++: what any processor runs, and what the others are compared with.

#include <algorithm>
#include <cstring>

#include "families.h"

namespace midstream {
namespace generic {
namespace {

#define MIDSTREAM_TARGET
#define MIDSTREAM_INLINE MIDSTREAM_TARGET __attribute__((always_inline)) inline

struct Vec {
  static constexpr int kRows = 1, kPanels = 1;
  template <class T>
  struct Sixteen {
    T lane[kWideStep];
  };
  using Register = Sixteen<float>;

  static Register zero() { return {}; }
  static Register splat(float value) {
    Register r;
    for (float& lane : r.lane) lane = value;
    return r;
  }
  static Register add(const Register& a, const Register& b) {
    Register r;
    for (int i = 0; i < kWideStep; ++i) r.lane[i] = a.lane[i] + b.lane[i];
    return r;
  }
  static Register mul(const Register& a, const Register& b) {
    Register r;
    for (int i = 0; i < kWideStep; ++i) r.lane[i] = a.lane[i] * b.lane[i];
    return r;
  }
  static Register fma(const Register& a, const Register& b, const Register& c) {
    Register r;
    for (int i = 0; i < kWideStep; ++i) r.lane[i] = a.lane[i] * b.lane[i] + c.lane[i];
    return r;
  }
  template <class T>
  static Register widen(const Sixteen<T>& value) {
    Register r;
    for (int i = 0; i < kWideStep; ++i) r.lane[i] = midstream::widen(value.lane[i]);
    return r;
  }
  template <class T>
  static Sixteen<T> narrow(const Register& value, T format) {
    Sixteen<T> r;
    for (int i = 0; i < kWideStep; ++i) r.lane[i] = midstream::narrow(value.lane[i], format);
    return r;
  }
  template <class T>
  static Register load(const T* from) {
    Register r;
    for (int i = 0; i < kWideStep; ++i) r.lane[i] = midstream::widen(from[i]);
    return r;
  }
  template <class T>
  static void store(T* to, const Sixteen<T>& value) {
    std::memcpy(to, value.lane, sizeof value.lane);
  }
  static void reduce(const Register& a, const Register& b, const Register& c, const Register& d,
                     float* sums) {
    for (const Register* r : {&a, &b, &c, &d}) {
      Register half = *r;
      for (int n = kWideStep / 2; n > 0; n /= 2) {
        for (int i = 0; i < n; ++i) half.lane[i] += half.lane[i + n];
      }
      *sums++ = half.lane[0];
    }
  }
};

#include "dot_kernel.h"
#include "norm_kernel.h"

}  // namespace
}  // namespace generic

const Family kGenericFamily = generic::kFamily;

}  // namespace midstream
