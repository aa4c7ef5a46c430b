// The algorithms for one kind of processor; compiled with its flags, chosen in dispatch.cpp. Everything is
// static or in a namespace of its own: no symbol compiled here may serve another target.
#include "target.h"

#define TAMIS_VNNI 1
namespace tamis_avx512_vnni {
#include "simd_avx512.h"
//
#include "algorithms.h"
}  // namespace tamis_avx512_vnni

extern const tamis_kernels tamis_kernels_avx512_vnni = {
    tamis_avx512_vnni::attend, tamis_avx512_vnni::key_mean, tamis_avx512_vnni::summarize, tamis_avx512_vnni::pack_kv, tamis_avx512_vnni::select, tamis_avx512_vnni::predict};
