// <immintrin.h> without GCC's warnings about itself.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
// GCC's own intrinsics read an "undefined" vector on purpose (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
