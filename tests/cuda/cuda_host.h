// Runs CUDA C++ kernels on the host, a block at a time: the same text that NVRTC compiles, by g++.
//
// Threads of a block are fibers, switched where they wait: at barriers, shuffles and votes. Each such
// place checks that the threads that it names come to it; a wait that cannot end is an error, as is
// a write past dynamic shared memory. Fresh shared memory is full of 0xff: NaN, and -1.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <type_traits>
#include <utility>

#define FLAME_HOST 1
#define __global__ static
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

#define FLAME_VECTORS(T, name)                                                                   \
  struct __align__(2 * sizeof(T)) name##2 { T x, y; };                                           \
  struct name##3 { T x, y, z; };                                                                 \
  struct __align__(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) name##4 { T x, y, z, w; };           \
  static inline name##2 make_##name##2(T x, T y) { return {x, y}; }                              \
  static inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                      \
  static inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
#define uint3 flame_uint3_of_vectors
FLAME_VECTORS(signed char, char)
FLAME_VECTORS(unsigned char, uchar)
FLAME_VECTORS(short, short)
FLAME_VECTORS(unsigned short, ushort)
FLAME_VECTORS(int, int)
FLAME_VECTORS(unsigned, uint)
FLAME_VECTORS(long long, longlong)
FLAME_VECTORS(unsigned long long, ulonglong)
FLAME_VECTORS(float, float)
FLAME_VECTORS(double, double)
#undef uint3

namespace flame {

enum Wait { RUNS, AT_BLOCK, AT_WARP, ENDED };
enum Exchange { SYNC, SHUFFLE, BALLOT, ANY, ALL, MATCH };

struct Thread {
  uint3 index;
  unsigned number;  // in its block
  Wait wait;
  int line;               // of the text where it waits
  Exchange exchange;      // and for AT_WARP: what for,
  unsigned mask;          // with which lanes,
  unsigned source;        // SHUFFLE: of whom it wants the word,
  unsigned long long word, result;
  jmp_buf context;
  ucontext_t first;
  bool started;
};

static const unsigned MOST_THREADS = 1024;
static const size_t STACK = 256 << 10;
static const unsigned SHARED_LIMIT = 232448, CANARY = 4096;
static Thread threads[MOST_THREADS];
static Thread* current = threads;
static unsigned count;  // threads of the block
static uint3 block_index;
static dim3 block_size, grid_size;
static jmp_buf scheduler;
static ucontext_t scheduler_first;
static char* stacks;
static char message[512];
static bool failed;
static void (*body)(void*);
static void* body_argument;
alignas(128) static unsigned char dynamic_shared[SHARED_LIMIT + CANARY];

__attribute__((noinline)) static void leave() {
  if (!_setjmp(current->context)) _longjmp(scheduler, 1);
}

static void fail(const char* what, int line) {
  if (!failed)
    snprintf(message, sizeof message, "%s: thread %u of block (%u, %u, %u), line %d", what,
             current->number, block_index.x, block_index.y, block_index.z, line);
  failed = true;
}

__attribute__((noinline)) static void wait_for_block(int line) {
  current->wait = AT_BLOCK;
  current->line = line;
  leave();
}

__attribute__((noinline)) static unsigned long long exchange(
    Exchange kind, unsigned mask, unsigned long long word, unsigned source, int line) {
  const unsigned lane = current->number % 32;
  if (!(mask >> lane & 1)) fail("a thread takes part in an exchange whose mask lacks it", line);
  current->exchange = kind;
  current->mask = mask;
  current->word = word;
  current->source = source;
  current->line = line;
  current->wait = AT_WARP;
  leave();
  return current->result;
}

static void fiber_main() {
  for (;;) {
    body(body_argument);
    current->wait = ENDED;
    leave();
  }
}

static void resume(Thread* t) {
  current = t;
  if (_setjmp(scheduler)) return;
  if (t->started) _longjmp(t->context, 1);
  t->started = true;
  getcontext(&t->first);
  t->first.uc_stack.ss_sp = stacks + t->number * STACK;
  t->first.uc_stack.ss_size = STACK;
  t->first.uc_link = &scheduler_first;
  makecontext(&t->first, fiber_main, 0);
  setcontext(&t->first);
}

static unsigned long long answer(const Thread* t, const Thread* warp, unsigned lanes) {
  unsigned votes = 0, equal = 0;
  for (unsigned l = 0; l < lanes; ++l)
    if (t->mask >> l & 1) {
      votes |= (unsigned)(warp[l].word != 0) << l;
      equal |= (unsigned)(warp[l].word == t->word) << l;
    }
  const unsigned present = lanes == 32 ? t->mask : t->mask & ((1u << lanes) - 1);
  switch (t->exchange) {
    case SHUFFLE:
      if (t->source >= lanes || !(t->mask >> t->source & 1)) {
        fail("a shuffle from a lane that takes no part", t->line);
        return 0;
      }
      return warp[t->source].word;
    case BALLOT: return votes;
    case ANY: return votes != 0;
    case ALL: return votes == present;
    case MATCH: return equal;
    default: return 0;
  }
}

// Lets the lanes go on that wait for each other in one warp; whether any did.
static bool release_warp(Thread* warp, unsigned lanes) {
  bool any = false;
  for (unsigned l = 0; l < lanes; ++l) {
    Thread* t = warp + l;
    if (t->wait != AT_WARP) continue;
    bool all = true;
    for (unsigned o = 0; o < lanes && all; ++o) {
      if (!(t->mask >> o & 1)) continue;
      const Thread* other = warp + o;
      all = other->wait == AT_WARP && other->mask == t->mask && other->line == t->line &&
            other->exchange == t->exchange;
    }
    if (!all) continue;
    unsigned group = t->mask;
    for (unsigned o = 0; o < lanes; ++o)
      if (group >> o & 1) {
        current = warp + o;
        warp[o].result = answer(warp + o, warp, lanes);
      }
    for (unsigned o = 0; o < lanes; ++o)
      if (group >> o & 1) warp[o].wait = RUNS;
    any = true;
  }
  return any;
}

static bool release_block() {
  int line = -1;
  for (unsigned i = 0; i < count; ++i) {
    if (threads[i].wait == ENDED) continue;
    if (threads[i].wait != AT_BLOCK) return false;
    current = threads + i;
    if (line >= 0 && threads[i].line != line) {
      fail("threads of a block wait at different barriers", threads[i].line);
      return false;
    }
    line = threads[i].line;
  }
  for (unsigned i = 0; i < count; ++i)
    if (threads[i].wait == AT_BLOCK) threads[i].wait = RUNS;
  return line >= 0;
}

// Runs the threads of a warp until all of them have ended or wait for the block.
static void run_warp(Thread* warp, unsigned lanes, bool descending) {
  bool ran = true;
  while (ran && !failed) {
    ran = false;
    for (unsigned i = 0; i < lanes && !failed; ++i) {
      Thread* t = warp + (descending ? lanes - 1 - i : i);
      if (t->wait == RUNS) {
        resume(t);
        ran = true;
      }
    }
    if (!failed) ran |= release_warp(warp, lanes);
  }
}

// One block with waits. One warp after the other goes as far as it can, so that a barrier that is
// missing between two of them shows, in ascending or in descending order.
static void run_block(bool descending) {
  for (unsigned i = 0; i < count; ++i) threads[i].wait = RUNS;
  const unsigned warps = (count + 31) / 32;
  do {
    for (unsigned i = 0; i < warps && !failed; ++i) {
      const unsigned first = 32 * (descending ? warps - 1 - i : i);
      run_warp(threads + first, count - first < 32 ? count - first : 32, descending);
    }
  } while (!failed && release_block());
  for (unsigned i = 0; i < count && !failed; ++i)
    if (threads[i].wait != ENDED) {
      current = threads + i;
      fail(threads[i].wait == AT_BLOCK ? "a barrier that not all threads of the block reach"
                                       : "an exchange that not all lanes of its mask reach",
           threads[i].line);
    }
}

struct Launch {
  unsigned grid[3], block[3], shared;
  int descending;  // order of threads, and of blocks
};

// Runs all blocks; 0, or 1 with a message. waits: whether the text has barriers or exchanges;
// first, last: its static shared memory.
static int run(const Launch* l, bool waits, void (*kernel)(void*), void* argument, char* first, char* last,
               char* error) {
  failed = false;
  body = kernel;
  body_argument = argument;
  block_size = dim3(l->block[0], l->block[1], l->block[2]);
  grid_size = dim3(l->grid[0], l->grid[1], l->grid[2]);
  count = block_size.x * block_size.y * block_size.z;
  if (count == 0 || count > MOST_THREADS || l->shared > SHARED_LIMIT) {
    snprintf(error, 512, "%u threads in a block with %u bytes of shared memory", count, l->shared);
    return 1;
  }
  if (waits && !stacks)
    stacks = (char*)mmap(nullptr, MOST_THREADS * STACK, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  for (unsigned i = 0; i < count; ++i) {
    threads[i].number = i;
    threads[i].index = {i % block_size.x, i / block_size.x % block_size.y,
                        i / block_size.x / block_size.y};
  }
  const unsigned long long blocks = (unsigned long long)grid_size.x * grid_size.y * grid_size.z;
  for (unsigned long long n = 0; n < blocks && !failed; ++n) {
    const unsigned long long b = l->descending ? blocks - 1 - n : n;
    block_index = {(unsigned)(b % grid_size.x), (unsigned)(b / grid_size.x % grid_size.y),
                   (unsigned)(b / grid_size.x / grid_size.y)};
    if (last > first) memset(first, 0xff, last - first);
    memset(dynamic_shared, 0xff, l->shared + CANARY);
    if (waits) {
      run_block(l->descending);
    } else {
      for (unsigned i = 0; i < count && !failed; ++i) {
        current = threads + (l->descending ? count - 1 - i : i);
        body(body_argument);
      }
    }
    for (unsigned i = 0; i < CANARY && !failed; ++i)
      if (dynamic_shared[l->shared + i] != 0xff)
        fail("a write past the block's dynamic shared memory", 0);
  }
  if (failed) {  // threads that still wait are given up
    for (Thread& t : threads) t.started = false;
    memcpy(error, message, sizeof message);
  }
  return failed;
}

template <typename... A, size_t... I>
static void call_with(void (*kernel)(A...), void** words, std::index_sequence<I...>) {
  kernel(*(std::remove_const_t<A>*)words[I]...);
}

// A kernel with arguments from an array of their addresses, as cuLaunchKernel takes them.
template <typename... A>
static void call(void (*kernel)(A...), void** words) {
  call_with(kernel, words, std::index_sequence_for<A...>());
}

template <typename... A>
static int argument_sizes(void (*)(A...), int* sizes) {
  const int found[] = {(int)sizeof(A)..., 0};
  memcpy(sizes, found, sizeof...(A) * sizeof(int));
  return sizeof...(A);
}

template <typename T>
static unsigned long long word_of(T value) {
  static_assert(sizeof(T) <= 8, "a shuffle of more than 8 bytes");
  unsigned long long word = 0;
  memcpy(&word, &value, sizeof value);
  return word;
}

template <typename T>
static T value_of(unsigned long long word) {
  T value;
  memcpy(&value, &word, sizeof value);
  return value;
}

// Shuffles: the lane of the segment of `width` lanes that is asked, or oneself.
template <typename T>
static T shuffle(unsigned mask, T value, long long lane, long long low, long long high, int line) {
  const unsigned own = current->number % 32;
  const unsigned source = lane < low || lane >= high ? own : (unsigned)lane;
  return value_of<T>(exchange(SHUFFLE, mask, word_of(value), source, line));
}

static inline long long segment(int width) { return current->number % 32 / width * width; }

template <typename T>
static T shuffle_to(int line, unsigned mask, T value, int lane, int width = 32) {
  const long long low = segment(width);
  return shuffle(mask, value, low + (lane & (width - 1)), low, low + width, line);
}
template <typename T>
static T shuffle_xor(int line, unsigned mask, T value, int bits, int width = 32) {
  const long long low = segment(width);
  return shuffle(mask, value, (long long)((current->number % 32) ^ bits), 0, low + width, line);
}
template <typename T>
static T shuffle_up(int line, unsigned mask, T value, unsigned by, int width = 32) {
  const long long low = segment(width);
  return shuffle(mask, value, (long long)(current->number % 32) - by, low, low + width, line);
}
template <typename T>
static T shuffle_down(int line, unsigned mask, T value, unsigned by, int width = 32) {
  const long long low = segment(width);
  return shuffle(mask, value, (long long)(current->number % 32) + by, low, low + width, line);
}

static inline void sync_warp(int line, unsigned mask = 0xffffffffu) {
  exchange(SYNC, mask, 0, 0, line);
}

static unsigned active_mask() {
  unsigned mask = 0, warp = current->number / 32 * 32;
  for (unsigned l = 0; l < 32 && warp + l < count; ++l)
    mask |= (unsigned)(threads[warp + l].wait != ENDED) << l;
  return mask;
}

}  // namespace flame

#define threadIdx (flame::current->index)
#define blockIdx (flame::block_index)
#define blockDim (flame::block_size)
#define gridDim (flame::grid_size)
static const int warpSize = 32;

static inline unsigned char* flame_host_dynamic_shared() { return flame::dynamic_shared; }

#define __syncthreads() flame::wait_for_block(__LINE__)
#define __syncwarp(...) flame::sync_warp(__LINE__, ##__VA_ARGS__)
#define __shfl_sync(...) flame::shuffle_to(__LINE__, __VA_ARGS__)
#define __shfl_xor_sync(...) flame::shuffle_xor(__LINE__, __VA_ARGS__)
#define __shfl_up_sync(...) flame::shuffle_up(__LINE__, __VA_ARGS__)
#define __shfl_down_sync(...) flame::shuffle_down(__LINE__, __VA_ARGS__)
#define __ballot_sync(mask, x) ((unsigned)flame::exchange(flame::BALLOT, mask, (x) != 0, 0, __LINE__))
#define __any_sync(mask, x) ((int)flame::exchange(flame::ANY, mask, (x) != 0, 0, __LINE__))
#define __all_sync(mask, x) ((int)flame::exchange(flame::ALL, mask, (x) != 0, 0, __LINE__))
#define __match_any_sync(mask, x) \
  ((unsigned)flame::exchange(flame::MATCH, mask, flame::word_of(x), 0, __LINE__))
#define __activemask() flame::active_mask()
#define __trap() flame::trap(__LINE__)

namespace flame {
static void trap(int line) {
  fail("a trap", line);
  current->wait = ENDED;
  leave();
}
}  // namespace flame

static inline int __syncthreads_vote(int) = delete;  // votes of blocks are not emulated

#include "cuda_host_numbers.h"
