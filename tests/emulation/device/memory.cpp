#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "emulator.h"
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#endif

namespace emulator {

std::map<std::string, Traffic> traffic;

namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kArena = size_t(256) << 20;  // all of it is poisoned at the start
#else
constexpr size_t kArena = size_t(24) << 30;  // address space only: pages appear when touched
#endif
constexpr size_t kPage = 4096, kGap = 16 * kPage;  // the gap is wider than any row of the tests' images
constexpr size_t kSharedArena = 4 << 20;           // the arena's end is shared memory
constexpr size_t kSector = 32, kGranule = 2;       // granule: the smallest element, for the race checks
constexpr size_t kMostWarps = 32;                  // of a block

// A thread is warp * kWarpStep + lane. Readers may also be several: of one warp (its number with lane kManyLanes), or
// of several warps.
constexpr uint16_t kWarpStep = 64, kManyLanes = 63, kManyWarps = 0xffff;

template <class T>
T* reserve(size_t count) {
  void* p =
      mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::runtime_error("emulator: no address space for the device's memory");
  return static_cast<T*>(p);
}

struct Region {
  size_t begin, end;
};

// Who last touched a granule of global memory. Blocks have serial numbers that count over all launches.
struct GlobalTouch {
  uint32_t writer, reader;
};
// Who last touched a granule of shared memory, and in which phase. Phases have serial numbers. One begins at each
// barrier, for the block, and one at each __syncwarp, for its warp.
struct SharedTouch {
  uint32_t write_phase, read_phase;
  uint16_t writer, reader;
  uint32_t copied_in;  // the block of a cp.async that is in flight
};
struct SectorTouch {
  uint32_t reader, writer;
};

struct Memory {
  char* base = reserve<char>(kArena);
  GlobalTouch* touches = reserve<GlobalTouch>(kArena / kGranule);
  SectorTouch* sectors = reserve<SectorTouch>(kArena / kSector);
  SharedTouch* shared_touches = reserve<SharedTouch>(kSharedArena / kGranule);
  std::vector<uint32_t> page_region = std::vector<uint32_t>(kArena / kPage);  // number of the region, from 1
  std::vector<Region> regions{{0, 0}};
  size_t used = kGap, shared_used = 0;         // of the arena
  size_t shared_bytes = 0, most_shared_bytes;  // what a block of the launch has, and may have

  std::map<const void*, size_t> shared_variables;  // key to offset; laid out anew for each launch
  Region dynamic{};
  Traffic* counted = nullptr;
  uint32_t block = 0, launch = 0, phase = 0;           // serial numbers
  uint32_t block_phase = 0, warp_phase[kMostWarps]{};  // the newest of the block, and of each warp

  Memory() { ASAN_POISON_MEMORY_REGION(base, kArena); }
  size_t shared_begin() const { return kArena - kSharedArena; }

  Region add_region(size_t at, size_t bytes) {
    const Region r{at, at + bytes};
    regions.push_back(r);
    for (size_t page = at / kPage; page * kPage < r.end; ++page) page_region[page] = uint32_t(regions.size() - 1);
    ASAN_UNPOISON_MEMORY_REGION(base + at, bytes);
    return r;
  }
  void remove_regions(size_t from) {
    while (regions.size() > 1 && regions.back().begin >= from) {
      const Region r = regions.back();
      regions.pop_back();
      for (size_t page = r.begin / kPage; page * kPage < r.end; ++page) page_region[page] = 0;
      ASAN_POISON_MEMORY_REGION(base + r.begin, r.end - r.begin);
    }
  }
  Region add_shared(size_t bytes) {
    const size_t at = shared_begin() + shared_used;
    shared_used += (bytes + kPage - 1) / kPage * kPage + kPage;
    if (shared_used > kSharedArena) fail("too many shared variables for the emulator");
    return add_region(at, bytes);
  }
};

Memory& memory() {
  static Memory m;
  return m;
}

size_t up(size_t n, size_t to) { return (n + to - 1) / to * to; }

std::string name_of(uint16_t thread) {
  if (thread == kManyWarps) return "several warps";
  const int warp = thread / kWarpStep, lane = thread % kWarpStep;
  return (lane == kManyLanes ? "several lanes" : "lane " + std::to_string(lane)) + " of warp " + std::to_string(warp);
}

// Warps are ordered by barriers alone, a warp's lanes also by __syncwarp. Shuffles, votes and what the tensor cores
// do order nothing in memory.
void check_shared(size_t offset, size_t n, bool write) {
  Memory& m = memory();
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const uint16_t warp = uint16_t(thread / 32), self = uint16_t(warp * kWarpStep + thread % 32);
  const uint32_t of_block = m.block_phase, of_warp = std::max(m.block_phase, m.warp_phase[warp]);
  const auto unordered = [&](uint16_t who, uint32_t phase) {
    return who != self && phase >= (who / kWarpStep == warp ? of_warp : of_block);
  };
  const auto race = [&](const std::string& with) {
    fail(std::string("race in shared memory: ") + (write ? "written" : "read") + " by " + name_of(self) + ", " + with);
  };
  const auto by = [&](uint16_t who) {
    return "by " + name_of(who) + ", no " + (who / kWarpStep == warp ? "__syncwarp" : "barrier") + " between";
  };
  for (size_t g = (offset - m.shared_begin()) / kGranule; g * kGranule < offset - m.shared_begin() + n; ++g) {
    SharedTouch& t = m.shared_touches[g];
    if (t.copied_in == m.block) race("being written by a cp.async in flight");
    if (unordered(t.writer, t.write_phase)) race("written " + by(t.writer));
    const bool others_read = unordered(t.reader, t.read_phase);
    if (write) {
      if (others_read) race("read " + by(t.reader));
      t.write_phase = m.phase;
      t.writer = self;
    } else {
      t.reader = !others_read                   ? self
                 : t.reader / kWarpStep == warp ? uint16_t(warp * kWarpStep + kManyLanes)
                                                : kManyWarps;
      t.read_phase = m.phase;
    }
  }
}

void mark_copy(const void* p, size_t n, uint32_t block) {
  for (size_t g = shared_address(p) / kGranule; g * kGranule < shared_address(p) + n; ++g)
    memory().shared_touches[g].copied_in = block;
}

void check_global(size_t offset, size_t n, bool write) {
  Memory& m = memory();
  // Blocks run in no fixed order. So what one writes, no other may touch in the same launch.
  const auto another = [&](uint32_t who) { return who >= m.launch && who != m.block; };
  for (size_t g = offset / kGranule; g * kGranule < offset + n; ++g) {
    GlobalTouch& t = m.touches[g];
    if (another(t.writer) || (write && another(t.reader)))
      fail(std::string("race between blocks: global memory ") + (write ? "written" : "read") + " here was " +
           (another(t.writer) ? "written" : "read") + " by another block of this launch");
    (write ? t.writer : t.reader) = m.block;
  }
  for (size_t s = offset / kSector; s * kSector < offset + n; ++s) {
    uint32_t& toucher = write ? m.sectors[s].writer : m.sectors[s].reader;
    if (toucher == m.block) continue;
    toucher = m.block;
    (write ? m.counted->written : m.counted->read) += kSector;
  }
}

}  // namespace

void* allocate(size_t bytes, bool fill) {
  Memory& m = memory();
  if (m.used + bytes + kGap > m.shared_begin()) throw std::runtime_error("emulator: the device's memory is full");
  const Region r = m.add_region(m.used, bytes);
  m.used = up(r.end, kPage) + kGap;
  if (fill) memset(m.base + r.begin, 0xff, bytes);
  return m.base + r.begin;
}

void reset() {
  Memory& m = memory();
  m.remove_regions(0);
  // Give the pages back, so that a test with a large tensor does not keep them.
  madvise(m.base, m.used, MADV_DONTNEED);
  m.used = kGap;
  traffic.clear();
}

void* shared_memory(const void* key, size_t bytes) {
  Memory& m = memory();
  auto [variable, is_new] = m.shared_variables.try_emplace(key, 0);
  if (is_new) {
    m.shared_bytes += bytes;
    if (m.shared_bytes > m.most_shared_bytes)
      fail("static and dynamic shared memory together are " + std::to_string(m.shared_bytes) +
           " bytes, of which a block has " + std::to_string(m.most_shared_bytes));
    const Region r = m.add_shared(bytes);
    variable->second = r.begin;
    memset(m.base + r.begin, 0xff, bytes);
  }
  return m.base + variable->second;
}

void* dynamic_shared_memory() { return memory().base + memory().dynamic.begin; }

uint32_t shared_address(const void* p) {
  const size_t address = uintptr_t(p) - uintptr_t(memory().base) - memory().shared_begin();
  if (address >= kSharedArena) fail("the shared address of what is not in shared memory");
  return uint32_t(address);
}

void* shared_pointer(uint32_t address) {
  if (address >= kSharedArena) fail("out of bounds: an address past all shared memory");
  return memory().base + memory().shared_begin() + address;
}

void begin_copy(void* p, size_t n) {
  access(p, n, true);
  mark_copy(p, n, memory().block);
}

void end_copy(void* p, size_t n) {
  mark_copy(p, n, 0);
  access(p, n, true);
}

void begin_launch(const char* kernel, size_t dynamic_shared_bytes, size_t most_shared) {
  Memory& m = memory();
  m.shared_bytes = dynamic_shared_bytes;
  m.most_shared_bytes = most_shared;
  m.counted = &traffic[kernel];
  m.counted->launches++;
  m.launch = m.block + 1;
  m.dynamic = dynamic_shared_bytes ? m.add_shared(dynamic_shared_bytes) : Region{};
}

void begin_block() {
  Memory& m = memory();
  ++m.block;
  begin_phase();
  m.counted->blocks++;
  // Shared memory keeps nothing from the block before.
  for (const Region& r : m.regions)
    if (r.begin >= m.shared_begin()) memset(m.base + r.begin, 0xff, r.end - r.begin);
}

void begin_phase() { memory().block_phase = ++memory().phase; }

void begin_warp_phase(int warp) { memory().warp_phase[warp] = ++memory().phase; }

void end_launch() {
  Memory& m = memory();
  m.remove_regions(m.shared_begin());
  m.shared_variables.clear();
  m.shared_used = 0;
  m.counted = nullptr;
}

void check_address(const void* p, size_t n, bool write, bool aligned) {
  Memory& m = memory();
  const size_t offset = uintptr_t(p) - uintptr_t(m.base);
  const char* what = write ? "write to " : "read of ";
  const char* kind = offset >= m.shared_begin() ? "shared memory" : "global memory";
  if (aligned && offset % n) fail(std::string("misaligned ") + what + std::to_string(n) + " bytes, " + kind);
  const Region r = m.regions[m.page_region[offset / kPage]];
  if (offset < r.begin || offset + n > r.end) fail(std::string("out of bounds: ") + what + kind);
}

void access(const void* p, size_t n, bool write, bool aligned) {
  Memory& m = memory();
  const size_t offset = uintptr_t(p) - uintptr_t(m.base);
  if (offset >= kArena || !m.counted || !n) return;
  check_address(p, n, write, aligned);
  if (offset >= m.shared_begin())
    check_shared(offset, n, write);
  else
    check_global(offset, n, write);
}

}  // namespace emulator

#ifndef __SANITIZE_ADDRESS__
// The functions that -fsanitize=thread makes the kernels call.
extern "C" {
#define RKL_HOOK(n)                                                         \
  void __tsan_read##n(void* p) { emulator::access(p, n, false); }           \
  void __tsan_write##n(void* p) { emulator::access(p, n, true); }           \
  void __tsan_unaligned_read##n(void* p) { emulator::access(p, n, false); } \
  void __tsan_unaligned_write##n(void* p) { emulator::access(p, n, true); }
RKL_HOOK(1)
RKL_HOOK(2)
RKL_HOOK(4)
RKL_HOOK(8)
RKL_HOOK(16)
#undef RKL_HOOK
void __tsan_read_range(void* p, size_t n) { emulator::access(p, n, false, false); }
void __tsan_write_range(void* p, size_t n) { emulator::access(p, n, true, false); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
#endif
