// The algorithms for one kind of processor; compiled with its flags, chosen in dispatch.cpp. Everything is
// static or in a namespace of its own: no symbol compiled here may serve another target.
#include "target.h"

namespace tamis_avx512 {
#include "simd_avx512.h"
//
#include "algorithms.h"
}  // namespace tamis_avx512

extern const tamis_kernels tamis_kernels_avx512 = {
    tamis_avx512::attend, tamis_avx512::key_mean, tamis_avx512::summarize, tamis_avx512::pack_kv, tamis_avx512::select, tamis_avx512::predict};
