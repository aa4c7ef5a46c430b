// The algorithms for one kind of processor; compiled with its flags, chosen in dispatch.cpp. Everything is
// static or in a namespace of its own: no symbol compiled here may serve another target.
#include "target.h"

#define TAMIS_VNNI 1
namespace tamis_avx_vnni {
#include "simd_avx2.h"
//
#include "algorithms.h"
}  // namespace tamis_avx_vnni

extern const tamis_kernels tamis_kernels_avx_vnni = {
    tamis_avx_vnni::attend, tamis_avx_vnni::key_mean, tamis_avx_vnni::summarize, tamis_avx_vnni::pack_kv, tamis_avx_vnni::select, tamis_avx_vnni::predict};
