// AMX tile registers: eight of 16 rows by 64 bytes. The compiler's intrinsics for them do not say that they
// read and write memory, and code around them may then be moved across; these do.
#pragma once
#include <stdint.h>
#include <string.h>

#define TILE_LOAD(tile, from, stride) \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"((const void*)(from)), "r"((int64_t)(stride)) : "memory")
#define TILE_STORE(tile, to, stride) \
  __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"((void*)(to)), "r"((int64_t)(stride)) : "memory")
#define TILE_ZERO(tile) __asm__ volatile("tilezero %%tmm" #tile ::)
// sum += a . b: over four signed bytes a lane into int32, or over two bf16 a lane into fp32.
#define TILE_DOT_INT8(sum, a, b) __asm__ volatile("tdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #sum ::)
#define TILE_DOT_BF16(sum, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sum ::)

// All eight tiles in full size for as long as this lives, on this thread.
struct TileScope {
  struct Palette {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  TileScope() {
    Palette p;
    memset(&p, 0, sizeof p);
    p.palette = 1;
    for (int i = 0; i < 8; ++i) p.row_bytes[i] = 64, p.rows[i] = 16;
    __asm__ volatile("ldtilecfg %0" ::"m"(p));
  }
  ~TileScope() { __asm__ volatile("tilerelease" ::); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};
