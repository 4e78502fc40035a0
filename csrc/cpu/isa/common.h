// What every instruction set's file includes before its #pragma: system headers must not be compiled for more than the
// baseline, since their inline functions are shared by the whole library.
#pragma once
#include <torch/csrc/stable/ops.h>

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
#include "cpu/simd/element.h"
#include "cpu/simd/scratch.h"
#include "geometry.h"
