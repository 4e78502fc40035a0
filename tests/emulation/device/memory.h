// The emulated device's memory: one arena with unreadable gaps between allocations, filled with NaN. Every access to it
// is checked and counted.
//
// The compiler reports the accesses. Kernels are compiled with -fsanitize=thread, which puts a call before every load
// and store. memory.cpp defines the called functions; no thread sanitizer is linked. The sanitized build uses
// AddressSanitizer instead, which knows the gaps as poisoned.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

namespace emulator {

// Device memory: every byte 0xff (NaN in fp32, bf16 and fp16) unless fill is false. Valid until reset().
void* allocate(size_t bytes, bool fill = true);
void reset();

// The current block's shared memory of one declaration (key), or the launch's dynamic part.
void* shared_memory(const void* key, size_t bytes);
void* dynamic_shared_memory();

// From a pointer into shared memory to the 32-bit address that a GPU has for it, and back. Other pointers fail.
uint32_t shared_address(const void* p);
void* shared_pointer(uint32_t address);

// Checks and counts n bytes at p that the running thread reads or writes. Memory outside the arena (stacks, kernel
// arguments) is ignored.
void access(const void* p, size_t n, bool write, bool aligned = true);
// The check alone: of an address in the arena that one lane gives, and at which others read or write.
void check_address(const void* p, size_t n, bool write, bool aligned = true);

// cp.async writes n bytes of shared memory at p at some time between these two calls. Nobody may touch them meanwhile.
void begin_copy(void* p, size_t n);
void end_copy(void* p, size_t n);

// What a kernel's blocks moved, in bytes of the 32-byte sectors that each block touched. The count assumes that a block
// finds its own sectors in its cache, but never those of another block. So it is an upper bound of the memory traffic.
struct Traffic {
  long launches = 0, blocks = 0, read = 0, written = 0;
};
extern std::map<std::string, Traffic> traffic;

// Called by the scheduler. most_shared: bytes of shared memory that a block may have, static and dynamic. A static
// variable counts when a thread reaches it; one that no thread of a launch reaches is not known here.
void begin_launch(const char* kernel, size_t dynamic_shared_bytes, size_t most_shared);
void begin_block();
void begin_phase();               // a barrier was passed
void begin_warp_phase(int warp);  // all lanes of a warp have reached a __syncwarp, and none has gone on
void end_launch();

}  // namespace emulator
