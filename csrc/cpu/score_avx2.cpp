// Score and norm on AVX2.

#include "families.h"

#if defined(__x86_64__)

#include <algorithm>
#include <cstring>

#include "intrinsics.h"

namespace midstream {
namespace avx2 {
namespace {

#define MIDSTREAM_TARGET __attribute__((target("avx2,fma,f16c")))
#define MIDSTREAM_INLINE MIDSTREAM_TARGET __attribute__((always_inline)) inline
#include "vec_avx2.h"

// They need the above.
#include "dot_kernel.h"
#include "norm_kernel.h"

}  // namespace
}  // namespace avx2

const Family kAvx2Family = avx2::kFamily;

}  // namespace midstream

#endif  // __x86_64__
