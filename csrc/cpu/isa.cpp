#include "midstream/isa.h"

#include <array>
#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace midstream {
namespace {

constexpr std::array<const char*, 3> kNames = {"generic", "avx2", "avx512"};
constexpr int kUnset = -1;

std::atomic<int> chosen{kUnset};

Isa capped(const std::string& name, const std::string& where) {
  for (int i = 0; i < static_cast<int>(kNames.size()); ++i) {
    if (name == kNames[i]) {
      const Isa cap = static_cast<Isa>(i);
      const Isa widest = detected_isa();
      return cap < widest ? cap : widest;
    }
  }
  throw std::invalid_argument(where + " is '" + name + "'; use one of generic, avx2, avx512");
}

}  // namespace

Isa detected_isa() {
#if defined(__x86_64__)
  // libgcc and compiler-rt look at XCR0 too, so a processor whose wide registers the operating
  // system does not save reports the narrower set.
  static const Isa widest = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl");
    return avx2 && avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::generic;
  }();
  return widest;
#else
  return Isa::generic;
#endif
}

Isa isa() {
  int now = chosen.load(std::memory_order_relaxed);
  if (now == kUnset) {
    const char* cap = std::getenv("MIDSTREAM_CPU_ISA");
    now = static_cast<int>(cap ? capped(cap, "MIDSTREAM_CPU_ISA") : detected_isa());
    chosen.store(now, std::memory_order_relaxed);
  }
  return static_cast<Isa>(now);
}

void set_isa_cap(const std::string& name) {
  chosen.store(static_cast<int>(capped(name, "the cap")), std::memory_order_relaxed);
}

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

}  // namespace midstream
