// What the threads of a call tell each other.
//
// A call is one parallel region: each costs its threads a sleep and a waking, more than a short call's work. A function
// whose name ends in _together is called by every thread of a region; it shares out its work and returns when all is
// done. After a failure threads do no more work, but go on to meet the others.
#pragma once
#include "attend.h"

static inline void fail(int* error, int status) {
#pragma omp atomic write
  *error = status;
}
static inline bool failed(const int* error) {
  int status;
#pragma omp atomic read
  status = *error;
  return status != TAMIS_OK;
}
