// The facts of the machine that the kernels are chosen and cut by, read once.
#pragma once
#include <cstdint>

namespace rkl::cpu {

constexpr int64_t kLine = 64;  // bytes of a line of memory

// Elements a thread takes at least: below, waking it, some 20 us, costs more than it saves.
constexpr int64_t kGrain = 32768;

struct Machine {
  bool avx2, avx512, avx512_bf16;  // with what else the kernels of that name use
  bool amx;                        // matrix instructions for bf16, which the library uses
  // Of a core's second-level cache: 1 MiB where the system does not say (some virtual machines); at least 256 KiB and
  // at most 2 MiB, as what is larger is shared by several cores.
  int64_t l2_bytes;
  int64_t l3_bytes;  // of the cache that a core shares with some others; 0 where the system does not say
};

const Machine& machine();

// Whether an output of so many bytes is better written past the caches: where a layer's image and output do not both
// fit, the next layer finds nothing of what was written first, and a line that is not read before it is written saves a
// third of the traffic (benchmarks/NOTES.md).
// One thread alone waits for lines to come more than memory is busy, so that it gains from half of that size on.
// Not where its pages are new, which is_resident tells: the system has just written those, so that they are in a cache.
inline bool exceeds_caches(int64_t output, int64_t threads) {
  return machine().l3_bytes && output >= machine().l3_bytes / (threads == 1 ? 4 : 2);
}

// How far from a core images lie that a layer has just written.
enum class Distance {
  held,    // in the core's own caches
  near,    // the hardware fetches them in time for windows, which take as long to ask as to multiply. Blocks ask
  beyond,  // what comes next is asked for, into the second-level cache
  far,     // and into the nearest one as well: it comes late
};

// Of images of so many bytes among all that a pass reads and writes. From a quarter of the third-level cache on two
// layers' images leave it little room; a pass that takes less than that in all finds them soon enough
// (benchmarks/NOTES.md).
inline Distance distance_of(int64_t images, int64_t all) {
  const int64_t share = machine().l3_bytes / 4;
  if (share && images >= share) return Distance::far;
  return all < share ? Distance::near : Distance::beyond;
}

// Whether rows of so many bytes from p on are whole lines of memory, as what is written past the caches must be.
inline bool in_whole_lines(const void* p, int64_t row_bytes) {
  return row_bytes % kLine == 0 && reinterpret_cast<uintptr_t>(p) % kLine == 0;
}

// Whether the page at p has memory behind it yet.
bool is_resident(const void* p);

}  // namespace rkl::cpu
