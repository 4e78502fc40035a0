// Fibers, barriers, warp exchanges and asynchronous copies.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "emulator.h"
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define RKL_ASAN(statement) statement
#else
#define RKL_ASAN(statement)
#endif
#ifndef __x86_64__
#error "the emulator switches stacks by x86-64 instructions"
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// Saves the callee-saved registers on the stack and the stack pointer in *save, and continues on another stack. This
// saves the two system calls of swapcontext, which would take most of the emulator's time.
extern "C" void rkl_switch_stack(void** save, void* to);
__asm__(R"(
.text
.type rkl_switch_stack, @function
rkl_switch_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");

namespace emulator {

Schedule schedule;

namespace {

constexpr size_t kStack = 256 << 10, kGuard = 4096;
constexpr size_t kMaxThreads = 1024;

// A warp's meeting place for one mask. It has two sets of values, as a fast lane may be one exchange ahead, never two.
struct Meeting {
  unsigned mask = 0;
  unsigned generation[32]{};
  unsigned ordered = 0;  // the newest generation that was a __syncwarp
  alignas(16) unsigned char values[2][32][64];
};

struct Copy {
  void* shared;
  const void* global;
  int valid;
  static constexpr int kBytes = 16;
  void perform() const {
    access(global, valid, false, false);
    memcpy(shared, global, valid);
    memset(static_cast<char*>(shared) + valid, 0, kBytes - valid);
  }
};

enum class State { ready, at_barrier, at_meeting, done };

struct Fiber {
  void* stack_pointer = nullptr;
  uint3 index{};
  State state = State::ready;
  int line = 0;  // of the barrier
  Meeting* meeting = nullptr;
  unsigned generation = 0;  // of the exchange waited for
  std::vector<Copy> open;   // cp.async not yet committed
  std::deque<std::vector<Copy>> groups;
  void* asan_frame = nullptr;
};

struct Failure {
  bool failed = false;
  std::string what;
};

struct Machine {
  std::vector<char*> stacks;
  std::vector<Fiber> fibers;
  std::vector<std::deque<Meeting>> meetings;  // one list for each warp
  const std::function<void()>* thread = nullptr;
  const char* kernel = "";
  void* stack_pointer = nullptr;  // the scheduler's own
  int current = -1;
  Failure failure;
  const void* asan_stack = nullptr;
  size_t asan_stack_size = 0;
  void* asan_frame = nullptr;
} machine;

Fiber& self() { return machine.fibers[machine.current]; }

void to_scheduler() {
  RKL_ASAN(__sanitizer_start_switch_fiber(self().state == State::done ? nullptr : &self().asan_frame,
                                          machine.asan_stack, machine.asan_stack_size);)
  rkl_switch_stack(&self().stack_pointer, machine.stack_pointer);
  RKL_ASAN(__sanitizer_finish_switch_fiber(self().asan_frame, &machine.asan_stack, &machine.asan_stack_size);)
}

void wait(State state) {
  self().state = state;
  to_scheduler();
}

void fiber_main() {
  RKL_ASAN(__sanitizer_finish_switch_fiber(nullptr, &machine.asan_stack, &machine.asan_stack_size);)
  (*machine.thread)();
  wait(State::done);
}

void resume(int i) {
  Fiber& f = machine.fibers[i];
  machine.current = i;
  threadIdx = f.index;
  f.state = State::ready;
  RKL_ASAN(__sanitizer_start_switch_fiber(&machine.asan_frame, machine.stacks[i], kStack);)
  rkl_switch_stack(&machine.stack_pointer, f.stack_pointer);
  RKL_ASAN(__sanitizer_finish_switch_fiber(machine.asan_frame, nullptr, nullptr);)
  machine.current = -1;
  if (machine.failure.failed) throw std::runtime_error(machine.failure.what);
}

void prepare_stacks(size_t n) {
  while (machine.stacks.size() < n) {
    // A page that cannot be touched lies below each stack.
    char* p = static_cast<char*>(
        mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (p == MAP_FAILED || mprotect(p, kGuard, PROT_NONE)) throw std::runtime_error("emulator: no memory for stacks");
    machine.stacks.push_back(p + kGuard);
  }
}

void prepare_fibers(dim3 block, size_t n) {
  machine.fibers.clear();
  machine.fibers.resize(n);
  machine.meetings.assign((n + 31) / 32, {});
  for (size_t i = 0; i < n; ++i) {
    Fiber& f = machine.fibers[i];
    f.index = {unsigned(i % block.x), unsigned(i / block.x % block.y), unsigned(i / block.x / block.y)};
    RKL_ASAN(__asan_unpoison_memory_region(machine.stacks[i], kStack);)  // a failed launch leaves frames behind
    void** top = reinterpret_cast<void**>(machine.stacks[i] + kStack) - 2;
    *top = reinterpret_cast<void*>(fiber_main);  // the switch returns to it; six saved registers lie below
    f.stack_pointer = top - 6;
  }
}

// 0 to n - 1 in the order that the schedule asks for.
std::vector<long> in_order(long n, std::mt19937& random) {
  std::vector<long> v(n);
  std::iota(v.begin(), v.end(), 0);
  if (schedule.order == Order::reverse) std::reverse(v.begin(), v.end());
  if (schedule.order == Order::shuffled) std::shuffle(v.begin(), v.end(), random);
  return v;
}

// Whether every lane of the mask has reached the exchange that fiber i waits for, or has returned.
bool met(int i) {
  const Fiber& f = machine.fibers[i];
  for (int l = 0, j = i / 32 * 32; l < 32 && j < int(machine.fibers.size()); ++l, ++j) {
    const Fiber& other = machine.fibers[j];
    if (!(f.meeting->mask >> l & 1) || other.state == State::done || f.meeting->generation[l] >= f.generation) continue;
    if (other.state == State::at_barrier) fail("a warp's exchange waits for a lane that waits in __syncthreads");
    return false;
  }
  return true;
}

// Runs one warp as far as it can get. Returns whether it moved.
bool run_warp(long warp, std::mt19937& random) {
  bool moved = false;
  const long first = warp * 32, n = std::min<long>(32, long(machine.fibers.size()) - first);
  const std::vector<long> lanes = in_order(n, random);
  for (bool again = true; again;) {
    again = false;
    for (long l : lanes) {
      const State state = machine.fibers[first + l].state;
      if (state == State::ready || (state == State::at_meeting && met(int(first + l)))) {
        resume(int(first + l));
        again = moved = true;
      }
    }
  }
  return moved;
}

// Lets the block pass its barrier if all threads wait there. Returns false when all threads have ended.
bool pass_barrier(bool moved) {
  size_t done = 0, waiting = 0;
  int line = 0;
  for (const Fiber& f : machine.fibers) {
    done += f.state == State::done;
    if (f.state != State::at_barrier) continue;
    if (waiting++ && f.line != line)
      fail("divergent __syncthreads, at lines " + std::to_string(line) + " and " + std::to_string(f.line));
    line = f.line;
  }
  if (done == machine.fibers.size()) return false;
  if (waiting + done == machine.fibers.size()) {
    if (done) fail("__syncthreads at line " + std::to_string(line) + " that other threads never reach: they returned");
    for (Fiber& f : machine.fibers) f.state = State::ready;
    begin_phase();
  } else if (!moved) {
    fail("deadlock: a barrier or a warp's exchange is not reached by every thread");
  }
  return true;
}

void run_block(dim3 block, std::mt19937& random) {
  const size_t n = size_t(block.x) * block.y * block.z;
  prepare_fibers(block, n);
  begin_block();
  for (bool running = true; running;) {
    bool moved = false;
    for (long w : in_order(long(n + 31) / 32, random)) moved |= run_warp(w, random);
    running = pass_barrier(moved);
  }
  for (const Fiber& f : machine.fibers)
    if (!f.open.empty() || !f.groups.empty()) fail("the kernel ended with a cp.async in flight");
}

// Whether the schedule removes the barrier at this place.
bool removed(std::source_location at) {
  if (schedule.removed.empty()) return false;
  return (at.file_name() + (":" + std::to_string(at.line()))).ends_with("/" + schedule.removed);
}

// Whether the schedule leaves this block of n out.
bool left_out(long block, long n) {
  return schedule.first_blocks >= 0 && block >= schedule.first_blocks && block < n - schedule.last_blocks;
}

}  // namespace

void fail(const std::string& what) {
  const auto triple = [](auto v) {
    return std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z);
  };
  const std::string where = machine.current < 0 ? "" : ", thread " + triple(threadIdx);
  const std::string message = std::string(machine.kernel) + ": " + what + " (block " + triple(blockIdx) + where + ")";
  if (machine.current < 0) throw std::runtime_error(message);
  // No exception can leave a fiber: the scheduler throws it.
  machine.failure = {true, message};
  to_scheduler();
  __builtin_unreachable();
}

void Launch::run(const void* kernel, const std::function<void()>& thread) const {
  const size_t n = size_t(block_.x) * block_.y * block_.z;
  machine.kernel = name_;
  machine.failure = {};
  blockIdx = {};
  if (!n || n > kMaxThreads || block_.z > 64 || !grid_.x || !grid_.y || !grid_.z || grid_.x > 0x7fffffffu ||
      grid_.y > 65535 || grid_.z > 65535)
    fail("launch configuration that no GPU takes");
  const SharedLimits limits = shared_limits(kernel);
  if (shared_bytes_ > limits.dynamic) fail("more dynamic shared memory than cudaFuncSetAttribute allowed");
  gridDim = grid_;
  blockDim = block_;
  machine.thread = &thread;
  prepare_stacks(n);
  std::mt19937 random(schedule.seed);
  const long blocks = long(grid_.x) * grid_.y * grid_.z;
  struct End {
    ~End() { end_launch(); }
  } end;
  begin_launch(name_, shared_bytes_, limits.all);
  // A list of all blocks of a large grid would be larger than the part that runs. That part runs in the grid's order.
  const bool all = schedule.first_blocks < 0;
  const std::vector<long> order = all ? in_order(blocks, random) : std::vector<long>();
  for (long b = 0; b < blocks; ++b) {
    if (left_out(b, blocks)) b = std::max(b, blocks - schedule.last_blocks);
    if (b >= blocks) break;
    const long i = all ? order[b] : b;
    blockIdx = {unsigned(i % grid_.x), unsigned(i / grid_.x % grid_.y), unsigned(i / grid_.x / grid_.y)};
    run_block(block_, random);
  }
}

void barrier(std::source_location at) {
  if (removed(at)) return;
  self().line = int(at.line());
  wait(State::at_barrier);
}

int lane() { return machine.current % 32; }

Lanes exchange_bytes(unsigned mask, const void* value, size_t n) {
  Fiber& f = self();
  if (!(mask >> lane() & 1)) fail("a lane is not in the mask it names");
  auto& meetings = machine.meetings[machine.current / 32];
  auto at = std::find_if(meetings.begin(), meetings.end(), [&](const Meeting& m) { return m.mask == mask; });
  if (at == meetings.end()) {
    meetings.emplace_back().mask = mask;
    at = meetings.end() - 1;
    memset(at->values, 0xff, sizeof at->values);
  }
  f.meeting = &*at;
  f.generation = ++at->generation[lane()];
  auto& values = at->values[f.generation & 1];
  memcpy(values[lane()], value, n);
  wait(State::at_meeting);
  unsigned present = 0;
  for (int l = 0; l < 32; ++l)
    if (mask >> l & 1 && self().meeting->generation[l] >= self().generation) present |= 1u << l;
  return {values, present};
}

// The first lane that goes on begins the warp's new phase. All others have reached the same line by then, and none of
// them has touched memory since.
void sync_warp(unsigned mask, std::source_location at) {
  if (removed(at)) return;
  exchange(mask, 0);
  Meeting& here = *self().meeting;
  if (here.ordered == self().generation) return;
  here.ordered = self().generation;
  const int first = machine.current / 32 * 32, end = std::min(first + 32, int(machine.fibers.size()));
  for (int i = first; i < end; ++i)
    if (!(mask >> (i - first) & 1) && machine.fibers[i].state != State::done)
      fail("__syncwarp of some of a warp's lanes, which the check for races does not know");
  begin_warp_phase(machine.current / 32);
}

void copy_async_16(void* shared, const void* global, int valid) {
  if (uintptr_t(shared) % Copy::kBytes || uintptr_t(global) % Copy::kBytes) fail("misaligned cp.async");
  if (valid < 0 || valid > Copy::kBytes) fail("cp.async of more bytes than it has");
  begin_copy(shared, Copy::kBytes);
  self().open.push_back({shared, global, valid});
  if (!schedule.late_copies) self().open.back().perform();
}

void copy_commit() {
  self().groups.push_back(std::move(self().open));
  self().open.clear();
}

void copy_wait(int groups_left) {
  auto& groups = self().groups;
  while (int(groups.size()) > groups_left) {
    for (const Copy& copy : groups.front()) {
      if (schedule.late_copies) copy.perform();
      end_copy(copy.shared, Copy::kBytes);
    }
    groups.pop_front();
  }
}

}  // namespace emulator
