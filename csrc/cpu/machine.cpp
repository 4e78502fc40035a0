#include "cpu/machine.h"

#include <sys/mman.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#endif

#include <algorithm>
#include <cstdio>

namespace rkl::cpu {

namespace {

#if defined(__x86_64__)
// __builtin_cpu_supports does not serve: clang 14 does not know the name f16c.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

// Whether the processor and the system support AMX. This asks the system whether a process may request the tile state,
// as oneDNN does before it uses tiles.
bool has_amx() {
#if defined(__linux__)
  constexpr long kStatesThatExist = 0x1021;  // ARCH_GET_XCOMP_SUPP
  constexpr uint64_t kTiles = uint64_t(1) << 18;
  uint64_t states = 0;
  return !syscall(SYS_arch_prctl, kStatesThatExist, &states) && (states & kTiles);
#else
  return false;
#endif
}
#endif

// sysconf does not serve: it adds up the caches of all groups of cores (320 MiB where a core has 32).
int64_t read_l3_bytes() {
  std::FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r");
  if (!file) return 0;
  long kib = 0;
  if (std::fscanf(file, "%ldK", &kib) != 1) kib = 0;
  std::fclose(file);
  return int64_t(kib) << 10;
}

Machine read_machine() {
  Machine machine{};
#if defined(__x86_64__)
  __builtin_cpu_init();
  machine.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  machine.avx512 = machine.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  machine.amx = has_amx();
  machine.avx512_bf16 = machine.avx512 && __builtin_cpu_supports("avx512bf16");
  machine.near_l3 = __builtin_cpu_is("amd");
#endif
  constexpr int64_t kKiB = 1024;
  int64_t told = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
  told = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
  machine.l2_bytes = told > 0 ? std::clamp(told, 256 * kKiB, 2048 * kKiB) : 1024 * kKiB;
  machine.l3_bytes = read_l3_bytes();
  return machine;
}

}  // namespace

bool is_resident(const void* p) {
#if defined(__linux__)
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE)), address = reinterpret_cast<uintptr_t>(p) / page * page;
  unsigned char is = 1;
  return mincore(reinterpret_cast<void*>(address), page, &is) || (is & 1);
#else
  return true;
#endif
}

const Machine& machine() {
  static const Machine once = read_machine();
  return once;
}

}  // namespace rkl::cpu
