// The algorithms for one kind of processor; compiled with its flags, chosen in dispatch.cpp. Everything is
// static or in a namespace of its own: no symbol compiled here may serve another target.
#include "target.h"

#define TAMIS_VNNI 1
#define TAMIS_AMX 1
namespace tamis_amx {
#include "simd_avx512.h"
//
#include "algorithms.h"
}  // namespace tamis_amx

extern const tamis_kernels tamis_kernels_amx = {
    tamis_amx::attend, tamis_amx::key_mean, tamis_amx::summarize, tamis_amx::pack_kv, tamis_amx::select, tamis_amx::predict};
