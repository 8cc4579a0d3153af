// Everything that the kernels include, ahead of the target regions (target.h).
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#include "../common/score_order.h"
#include "kernels.h"
#include "kernels_for.h"
#include "scratch.h"
#include "simd_portable.h"
#include "target.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif
