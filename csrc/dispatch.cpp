// The C ABI: finds the target by name and calls it. This file and baseline are compiled for the oldest
// processor of the platform.
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#ifdef TAMIS_HAS_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifdef TAMIS_HAS_NEON_DOT
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "geometry.h"
#include "target.h"
#include "together.h"

extern const tamis_kernels tamis_kernels_baseline;
#if defined(__x86_64__)
extern const tamis_kernels tamis_kernels_avx2, tamis_kernels_avx512, tamis_kernels_avx512_vnni;
#endif
#ifdef TAMIS_HAS_AVX_VNNI
extern const tamis_kernels tamis_kernels_avx_vnni;
#endif
#ifdef TAMIS_HAS_AMX
extern const tamis_kernels tamis_kernels_amx;
#endif
#ifdef TAMIS_HAS_NEON_DOT
extern const tamis_kernels tamis_kernels_neon_dot;
#endif

namespace {

struct Target {
  const char* name;
  const tamis_kernels* kernels;
  bool (*runs_here)();
};

bool always() { return true; }

#if defined(__x86_64__)
// By its bit: not every compiler knows the name.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
#endif

#ifdef TAMIS_HAS_AVX_VNNI
// By its bit, since GCC 11 does not know the name. It stands in a subleaf that older processors do not have; those
// report 0 as the number of the last one.
bool has_avx_vnni() {
  unsigned a, b, c, d;
  if (!has_avx2() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || a < 1) return false;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
}
#endif

#ifdef TAMIS_HAS_AMX
bool has_bf16_and_byte_tables() {
  return has_vnni() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
}
// Tiles are too much state to be on for everybody: Linux wants to be asked once per process, and may say no.
bool ask_for_tiles() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const unsigned bf16 = 1u << 22, tile = 1u << 24, int8 = 1u << 25, all = bf16 | tile | int8;
  if ((d & all) != all) return false;
  const long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
bool has_amx() {
  static const bool granted = has_bf16_and_byte_tables() && ask_for_tiles();
  return granted;
}
#endif

#ifdef TAMIS_HAS_NEON_DOT
// The dot product, and what ARMv8.1 and 8.2 allow the compiler besides.
bool has_neon_dot() {
  const unsigned long needed = HWCAP_ASIMDDP | HWCAP_ATOMICS | HWCAP_ASIMDRDM | HWCAP_CRC32;
  return (getauxval(AT_HWCAP) & needed) == needed;
}
#endif

// Best first.
const Target kTargets[] = {
#ifdef TAMIS_HAS_AMX
    {"amx", &tamis_kernels_amx, has_amx},
#endif
#if defined(__x86_64__)
    {"avx512_vnni", &tamis_kernels_avx512_vnni, has_vnni},
#endif
#ifdef TAMIS_HAS_AVX_VNNI
    // Half the width of avx512, but one instruction for its three: faster in int8. A processor with AVX-512 and this one
    // has avx512_vnni too, unless a virtual machine hides it.
    {"avx_vnni", &tamis_kernels_avx_vnni, has_avx_vnni},
#endif
#if defined(__x86_64__)
    {"avx512", &tamis_kernels_avx512, has_avx512},
    {"avx2", &tamis_kernels_avx2, has_avx2},
#endif
#ifdef TAMIS_HAS_NEON_DOT
    {"neon_dot", &tamis_kernels_neon_dot, has_neon_dot},
#endif
    {"baseline", &tamis_kernels_baseline, always},
};

constexpr int kCount = sizeof kTargets / sizeof *kTargets;

// Asked once a process: in a virtual machine each cpuid is a visit to its host, which takes some ten microseconds.
struct Machine {
  bool runs[kCount];
  char here[128], built[128];
  Machine() {
    here[0] = built[0] = 0;
    for (int i = 0; i < kCount; ++i) {
      runs[i] = kTargets[i].runs_here();
      append(built, sizeof built, kTargets[i].name);
      if (runs[i]) append(here, sizeof here, kTargets[i].name);
    }
  }
  static void append(char* list, size_t size, const char* name) {
    if (list[0]) strncat(list, " ", size - strlen(list) - 1);
    strncat(list, name, size - strlen(list) - 1);
  }
};
const Machine& machine() {
  static const Machine one;
  return one;
}

const tamis_kernels* find(const char* name) {
  for (int i = 0; i < kCount; ++i)
    if (name && !strcmp(kTargets[i].name, name)) return machine().runs[i] ? kTargets[i].kernels : nullptr;
  return nullptr;
}

template <class Args>
int call(const char* target, int (*tamis_kernels::*function)(const Args*), const Args* args) {
  const tamis_kernels* kernels = find(target);
  return kernels ? (kernels->*function)(args) : TAMIS_UNKNOWN_TARGET;
}

}  // namespace

// The first write to each page of fresh memory is a visit to the system: up to a fifth of a sparse call with a long
// output. Pages of 2 MB need few. Above 32 MB glibc maps every allocation anew; below, memory has mostly been used before.
void tamis_large_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = 2 << 20, start = (uintptr_t)data;
  if (bytes < 32 << 20) return;
  const uintptr_t first = (start + page - 1) / page * page, end = (start + (uintptr_t)bytes) / page * page;
  madvise((void*)first, end - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

int tamis_abi_version(void) { return TAMIS_ABI_VERSION; }
const char* tamis_targets(void) { return machine().here; }
const char* tamis_built_targets(void) { return machine().built; }

int tamis_attend(const char* target, const tamis_attend_args* a) {
  const int64_t entries = a->batch * a->heads * a->geometry.q_len * a->value_dim;
  tamis_large_pages(a->output, entries * (a->query.dtype == TAMIS_FP32 ? 4 : 2));
  return call(target, &tamis_kernels::attend, a);
}
int tamis_key_mean(const char* target, const tamis_summarize_args* a) {
  return call(target, &tamis_kernels::key_mean, a);
}
int tamis_summarize(const char* target, const tamis_summarize_args* a) {
  return call(target, &tamis_kernels::summarize, a);
}
int tamis_pack_kv(const char* target, const tamis_pack_args* a) { return call(target, &tamis_kernels::pack_kv, a); }
int tamis_select(const char* target, const tamis_select_args* a) { return call(target, &tamis_kernels::select, a); }

int tamis_predict(const char* target, tamis_predict_args* args) {
  tamis_predict_args& a = *args;
  const int error = call(target, &tamis_kernels::predict, (const tamis_predict_args*)args);
  const tamis_select_args& s = a.select;
  const int64_t rows = error ? 0 : s.batch * s.heads * blocks_of(s.geometry.q_len, s.geometry.block_q);
  a.max_blocks = 0;
  for (int64_t n = 0; n < rows; ++n) a.max_blocks = greatest(a.max_blocks, s.kv_num_blocks[n]);
  return error;
}

void tamis_used_blocks_together(const tamis_attend_args* args, uint8_t* used, Team& team) {
  const tamis_attend_args& a = *args;
  const tamis_geometry& g = a.geometry;
  const int64_t q_blocks = blocks_of(g.q_len, g.block_q), kv_blocks = blocks_of(g.kv_len, g.block_kv);
  const int64_t parts = blocks_of(g.kv_len, TAMIS_PACK_BLOCK), group = a.heads / greatest(a.kv_heads, 1);
#pragma omp for schedule(dynamic, 1) nowait
  for (int64_t n = 0; n < a.batch * a.kv_heads; ++n) {
    uint8_t* mine = used + n * parts;
    if (parts) memset(mine, 0, parts);
    const int64_t b = n / a.kv_heads;
    for (int64_t h = n % a.kv_heads * group; h < (n % a.kv_heads + 1) * group; ++h)
      for (int64_t qb = 0; qb < q_blocks; ++qb) {
        int64_t count = kv_blocks;
        const int32_t* list = nullptr;
        if (a.kv_num_blocks) {
          count = a.kv_num_blocks[b * a.num_stride[0] + h * a.num_stride[1] + qb * a.num_stride[2]];
          list = a.kv_indices + b * a.idx_stride[0] + h * a.idx_stride[1] + qb * a.idx_stride[2];
        }
        if (count > (list ? a.max_blocks : kv_blocks)) {
          fail(team, TAMIS_CORRUPT_MASK);
          continue;
        }
        for (int64_t at = 0; at < count; ++at) {
          const int64_t kb = list ? list[at] : at;
          if (kb < 0 || kb >= kv_blocks) {
            fail(team, TAMIS_CORRUPT_MASK);
            break;
          }
          const int64_t first = kb * g.block_kv / TAMIS_PACK_BLOCK;
          if (mine[first] || !block_visible(g, b, h, qb, kb)) continue;
          for (int64_t p = first; p < least(first + g.block_kv / TAMIS_PACK_BLOCK, parts); ++p) mine[p] = 1;
        }
      }
  }
  meet(team);
}

int tamis_used_blocks(const tamis_attend_args* args, uint8_t* used) {
  Team team;
#pragma omp parallel num_threads(args->threads)
  tamis_used_blocks_together(args, used, team);
  return team.error;
}

int tamis_expand(const uint64_t* bits, int64_t rows, int64_t kv_blocks, int64_t max_blocks, int32_t* kv_indices,
                 int32_t threads) {
  const int64_t words = (kv_blocks + 63) / 64;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    int32_t* to = kv_indices + r * max_blocks;
    int64_t n = 0;
    for (int64_t w = 0; w < words; ++w)
      for (uint64_t word = bits[r * words + w]; word && n < max_blocks; word &= word - 1)
        to[n++] = (int32_t)(w * 64 + __builtin_ctzll(word));
    for (; n < max_blocks; ++n) to[n] = -1;
  }
  return TAMIS_OK;
}
