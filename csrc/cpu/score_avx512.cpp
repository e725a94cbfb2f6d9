// Score and norm on AVX-512.

#include "families.h"

#if defined(__x86_64__)

#include <algorithm>
#include <cstring>

#include "intrinsics.h"

namespace midstream {
namespace avx512 {
namespace {

#define MIDSTREAM_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx2,fma")))
#define MIDSTREAM_INLINE MIDSTREAM_TARGET __attribute__((always_inline)) inline
#include "vec_avx512.h"

// They need the above.
#include "dot_kernel.h"
#include "norm_kernel.h"

}  // namespace
}  // namespace avx512

const Family kAvx512Family = avx512::kFamily;

}  // namespace midstream

#endif  // __x86_64__
