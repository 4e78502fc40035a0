// Elements in memory and as float: bf16 and fp16 are stored in 16 bits and computed with in 32.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <utility>

#include "geometry.h"

namespace rkl::cpu {

using bf16 = c10::BFloat16;
using f16 = c10::Half;

template <class F>
void by_type(Dtype dtype, F&& f) {
  rkl::by_type<bf16, f16>(dtype, std::forward<F>(f));
}

}  // namespace rkl::cpu
