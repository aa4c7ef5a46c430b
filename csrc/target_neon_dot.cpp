// The algorithms for one kind of processor; compiled with its flags, chosen in dispatch.cpp. Everything is
// static or in a namespace of its own: no symbol compiled here may serve another target.
#include "target.h"

namespace tamis_neon_dot {
#include "simd_neon.h"
//
#include "algorithms.h"
}  // namespace tamis_neon_dot

extern const tamis_kernels tamis_kernels_neon_dot = {
    tamis_neon_dot::attend, tamis_neon_dot::key_mean, tamis_neon_dot::summarize, tamis_neon_dot::pack_kv, tamis_neon_dot::select, tamis_neon_dot::predict};
