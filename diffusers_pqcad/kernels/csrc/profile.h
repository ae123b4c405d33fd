/* Seconds spent in the phases of calls, for profiles. */
#pragma once

#include <omp.h>
#include <string.h>

/* Seconds of the calling thread's calls so far, for profiles: rounding with all before it, products, norms. */
enum { ROUNDING, PRODUCTS, NORMS, PHASES };
static _Thread_local double seconds[PHASES];

void read_seconds(double *target) { memcpy(target, seconds, sizeof seconds); }

/* Add to `phase` the time since `started`; return now. */
static double clock_phase(int phase, double started)
{
    double now = omp_get_wtime();
    seconds[phase] += now - started;
    return now;
}
