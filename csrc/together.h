// What the threads of a call tell each other.
//
// A call is one parallel region: each costs its threads a sleep and a waking, more than a short call's work. A function
// whose name ends in _together is called by every thread of a region; it shares out its work and, but for the last of
// a region, returns when all is done. After a failure threads do no more work, but go on to meet the others.
#pragma once
#include <omp.h>
#include <sched.h>
#include <time.h>

#include "attend.h"

struct Team {
  int error = TAMIS_OK;
  int arrived = 0, meetings = 0;
};

static inline void fail(Team& team, int status) { __atomic_store_n(&team.error, status, __ATOMIC_RELAXED); }
static inline bool failed(const Team& team) { return __atomic_load_n(&team.error, __ATOMIC_RELAXED) != TAMIS_OK; }

// What each thread has of `count` pieces: always the same ones, so that they are in its cache.
struct Range {
  int64_t first, end;
};
static inline Range own_share(int64_t count) {
  const int64_t threads = omp_get_num_threads(), at = omp_get_thread_num();
  return {count * at / threads, count * (at + 1) / threads};
}

// Returns when every thread of the region is here. They mostly come at the same time, so the others are looked for before
// this thread lets go of its core: OpenMP's barrier would, where OMP_WAIT_POLICY is passive, sleep at once.
static inline void meet(Team& team) {
  constexpr int kLooks = 1000;  // tens of microseconds, as long as it takes to be woken
  // Then for one that has been woken late, and for one whose core this thread has: some 300 us in all where a pause takes
  // 140 cycles. A nap takes at least 100 us, which is a seventh of a prediction.
  constexpr int kYields = 300, kBetween = 20;
  const timespec pause = {0, 50000};
  const int threads = omp_get_num_threads();
  if (threads == 1) return;
  const int before = __atomic_load_n(&team.meetings, __ATOMIC_ACQUIRE);
  if (__atomic_add_fetch(&team.arrived, 1, __ATOMIC_ACQ_REL) == threads) {
    __atomic_store_n(&team.arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&team.meetings, before + 1, __ATOMIC_RELEASE);
    return;
  }
  for (int looks = 0; __atomic_load_n(&team.meetings, __ATOMIC_ACQUIRE) == before; ++looks) {
    if (looks >= kLooks + kYields * kBetween) {
      nanosleep(&pause, nullptr);
    } else if (looks >= kLooks && looks % kBetween == 0) {
      sched_yield();
    } else {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      __asm__ volatile("yield");
#endif
    }
  }
}
