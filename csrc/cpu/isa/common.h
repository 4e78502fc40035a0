// The headers that every instruction set's file includes before its #pragma. System headers must not be compiled for
// more than the baseline, since their inline functions are shared by the whole library.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "activation.h"
#include "cpu/depthwise/gather.h"
#include "cpu/depthwise/lattice.h"
#include "cpu/kernels.h"
#include "cpu/machine.h"
#include "cpu/simd/scratch.h"
#include "geometry.h"

// Code that is compiled for more than the baseline stands between RKL_BEGIN_TARGET and RKL_END_TARGET.
#define RKL_PRAGMA(words) _Pragma(#words)
#if defined(__clang__)
#define RKL_BEGIN_TARGET(names) RKL_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define RKL_END_TARGET RKL_PRAGMA(clang attribute pop)
#else
#define RKL_BEGIN_TARGET(names) RKL_PRAGMA(GCC target(names))
#define RKL_END_TARGET
#endif
