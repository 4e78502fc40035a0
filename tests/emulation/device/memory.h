// The emulated device's memory: one arena with unreadable gaps between allocations, filled with NaN, in which every
// access is checked and counted.
//
// Who reports accesses: the compiler. Kernels are compiled with -fsanitize=thread, which puts a call before every load
// and store; the functions that it calls are defined in memory.cpp (no thread sanitizer is linked). The sanitized build
// has AddressSanitizer in that place, to which the gaps are known as poisoned.
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

// The 32-bit address that a GPU has for what lies in shared memory, and back; what is not in it fails.
uint32_t shared_address(const void* p);
void* shared_pointer(uint32_t address);

// Checks and counts n bytes at p that the running thread reads or writes. What is not in the arena (stacks, kernel
// arguments) is not looked at.
void access(const void* p, size_t n, bool write, bool aligned = true);

// What a kernel's blocks moved, in bytes of the 32-byte sectors that each block touched: a block is taken to have its
// sectors in its cache, and no block those of another. So this is an upper bound of what reaches the memory.
struct Traffic {
  long launches = 0, blocks = 0, read = 0, written = 0;
};
extern std::map<std::string, Traffic> traffic;

// Called by the scheduler. most_shared: bytes that a block may have of shared memory, static and dynamic. Static ones
// count when a thread comes to them: what no thread of a launch comes to is not known here.
void begin_launch(const char* kernel, size_t dynamic_shared_bytes, size_t most_shared);
void begin_block();
void begin_phase();  // a barrier was passed
void end_launch();

}  // namespace emulator
