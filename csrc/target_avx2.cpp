// The algorithms for one kind of processor; compiled with its flags, chosen in dispatch.cpp. Everything is
// static or in a namespace of its own: no symbol compiled here may serve another target.
#include "target.h"

namespace tamis_avx2 {
#include "simd_avx2.h"
//
#include "algorithms.h"
}  // namespace tamis_avx2

extern const tamis_kernels tamis_kernels_avx2 = {
    tamis_avx2::attend, tamis_avx2::key_mean, tamis_avx2::summarize, tamis_avx2::pack_kv, tamis_avx2::select, tamis_avx2::predict};
