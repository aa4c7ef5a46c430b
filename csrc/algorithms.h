// Every algorithm, written once on the names of a simd_*.h that was included before. Included inside a
// target's namespace, once per target file.
#include "rows.h"
//
#include "summarize.h"
//
#include "pack.h"
//
#include "select.h"
//
#include "attend_driver.h"
