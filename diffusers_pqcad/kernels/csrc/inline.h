/* Small functions that are compiled into their callers, and short loops that are compiled without a loop. */
#pragma once

#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

/* Before a loop of a constant number of steps, 8 at most. Of a number in place of `full`, clang leaves shorter loops rolled. */
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif

INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t round_up(int64_t number, int64_t multiple) { return (number + multiple - 1) / multiple * multiple; }
