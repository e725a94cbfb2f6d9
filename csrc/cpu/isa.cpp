#include "midstream/isa.h"

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#include "families.h"

#if MIDSTREAM_HAS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace midstream {
namespace {

constexpr std::array<const char*, 5> kNames = {"generic", "avx2", "avx512", "avx512bf16", "amx"};
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
  throw std::invalid_argument(where + " is '" + name +
                              "'; use one of generic, avx2, avx512, avx512bf16, amx");
}

#if MIDSTREAM_HAS_AMX
/// Whether the processor multiplies bf16 tiles, the operating system saves them, and Linux lets
/// this process have them (Documentation/arch/x86/xstate.rst: 8 KiB that are off by default).
bool has_amx() {
  std::uint32_t a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr std::uint32_t kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if ((d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & (1u << 27)) == 0) return false;  // OSXSAVE
  __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  constexpr std::uint32_t kTileState = 3u << 17;
  if ((a & kTileState) != kTileState) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

#if defined(__x86_64__)
// libgcc and compiler-rt look at XCR0 too, so a processor whose wide registers the operating system
// does not save reports the narrower set.
Isa detect() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("f16c")) {
    return Isa::generic;
  }
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl")) {
    return Isa::avx2;
  }
#if MIDSTREAM_HAS_BF16
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::avx512;
#if MIDSTREAM_HAS_AMX
  if (has_amx()) return Isa::amx;
#endif
  return Isa::avx512bf16;
#else
  return Isa::avx512;
#endif
}
#else
Isa detect() { return Isa::generic; }
#endif

}  // namespace

Isa detected_isa() {
  static const Isa widest = detect();
  return widest;
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
