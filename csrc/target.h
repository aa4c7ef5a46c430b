// What a target file offers to dispatch.cpp, and the system headers its algorithms use: those must be
// included here, outside the target's namespace.
#pragma once
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "attend.h"
#include "together.h"

struct tamis_kernels {
  int (*attend)(const tamis_attend_args*);
  int (*key_mean)(const tamis_summarize_args*);
  int (*summarize)(const tamis_summarize_args*);
  int (*pack_kv)(const tamis_pack_args*);
  int (*select)(const tamis_select_args*);
  int (*predict)(const tamis_predict_args*);
};

// Asks for pages of 2 MB where memory is long and fresh.
void tamis_large_pages(void* data, int64_t bytes);
// tamis_used_blocks by the threads of a region: see together.h.
void tamis_used_blocks_together(const tamis_attend_args* args, uint8_t* used, Team& team);
