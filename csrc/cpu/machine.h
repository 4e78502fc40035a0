// The facts about the machine that decide which kernels serve and how work is cut. They are read once.
#pragma once
#include <cstdint>

namespace rkl::cpu {

constexpr int64_t kLine = 64;  // bytes of a cache line

// The fewest elements worth a thread: waking a thread costs some 20 us.
constexpr int64_t kGrain = 32768;

struct Machine {
  bool avx2, avx512, avx512_bf16;  // each with the other extensions that the kernels of that name use
  bool amx;                        // matrix instructions for bf16, which oneDNN uses
  // Whether the third-level cache is so near that the hardware fetches lines from it in time. AMD's is: a few cores
  // share it. Intel's lies along all cores of a socket.
  bool near_l3;
  // Bytes of a core's second-level cache: 1 MiB where the system does not say (some virtual machines); at least 256
  // KiB, and at most 2 MiB, since several cores share a larger one.
  int64_t l2_bytes;
  int64_t l3_bytes;  // of the third-level cache, which a core shares with some others; 0 where the system does not say
};

const Machine& machine();

// Whether an output of `output` bytes is better written past the caches (by streaming stores). Where a layer's image
// and output do not both fit, the next layer finds nothing of what was written first. A streaming store does not read a
// line before it writes it, which saves a third of the traffic (benchmarks/NOTES.md). One thread waits for lines more
// than it keeps memory busy, so that it gains from half of that size on. Callers must also ask is_resident: the system
// has just zeroed new pages, so that those are in a cache.
inline bool exceeds_caches(int64_t output, int64_t threads) {
  return machine().l3_bytes && output >= machine().l3_bytes / (threads == 1 ? 4 : 2);
}

// How far from a core images lie that a layer has just written, and what is prefetched of them.
enum class Distance {
  held,    // in the core's own caches: nothing
  near,    // blocks prefetch. Windows do not: it costs as much as their sums, and the hardware fetches in time for them
  beyond,  // windows prefetch what comes next as well, into the second-level cache
  far,     // windows also prefetch it into the nearest cache, since it arrives late
};

// images: bytes of the images in question; all: bytes that a pass reads and writes. Where images take a quarter of the
// third-level cache or more, those of two layers leave little room in it. A pass that takes less than a quarter in all
// gets its lines soon enough from a near one (benchmarks/NOTES.md).
inline Distance distance_of(int64_t images, int64_t all) {
  const int64_t share = machine().l3_bytes / 4;
  if (share && images >= share) return Distance::far;
  return machine().near_l3 && all < share ? Distance::near : Distance::beyond;
}

// Whether rows of `row_bytes` bytes from p on are whole cache lines, as streaming stores need them.
inline bool in_whole_lines(const void* p, int64_t row_bytes) {
  return row_bytes % kLine == 0 && reinterpret_cast<uintptr_t>(p) % kLine == 0;
}

// Whether the page at p has memory behind it yet.
bool is_resident(const void* p);

}  // namespace rkl::cpu
