/* Small functions that are compiled into their callers. */
#pragma once

#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t round_up(int64_t number, int64_t multiple) { return (number + multiple - 1) / multiple * multiple; }
