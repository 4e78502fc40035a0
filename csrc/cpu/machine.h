// The facts of the machine that the kernels are chosen and cut by, read once.
#pragma once
#include <cstdint>

namespace rkl::cpu {

struct Machine {
  bool avx2, avx512, avx512_bf16;  // with what else the kernels of that name use
  // Of a core's second-level cache: 1 MiB where the system does not say (some virtual machines); at least 256 KiB and
  // at most 2 MiB, as what is larger is shared by several cores.
  int64_t l2_bytes;
};

const Machine& machine();

}  // namespace rkl::cpu
