// The algorithms for one kind of processor; compiled with its flags, chosen in dispatch.cpp. Everything is
// static or in a namespace of its own: no symbol compiled here may serve another target.
#include "target.h"

namespace tamis_baseline {
#include "simd_generic.h"
//
#include "algorithms.h"
}  // namespace tamis_baseline

extern const tamis_kernels tamis_kernels_baseline = {
    tamis_baseline::attend, tamis_baseline::key_mean, tamis_baseline::summarize, tamis_baseline::pack_kv, tamis_baseline::select, tamis_baseline::predict};
