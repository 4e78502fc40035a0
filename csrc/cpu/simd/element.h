// Elements in memory and as float: bf16 and fp16 are stored in 16 bits and computed with in 32.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "geometry.h"

namespace rkl::cpu {

using bf16 = c10::BFloat16;
using f16 = c10::Half;

// Call f with a value of the element type as argument: by_type(dtype, [&](auto zero) { using T = decltype(zero); ...
// }).
template <class F>
void by_type(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f32:
      return f(float{});
    case Dtype::bf16:
      return f(bf16{});
    case Dtype::f16:
      return f(f16{});
  }
}

}  // namespace rkl::cpu
