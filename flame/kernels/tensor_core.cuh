// Tensor cores, shared-memory matrices and asynchronous copies: one small function an instruction.
// No kernel has inline PTX of its own: it stands here and, for conversions, in numbers.cuh.
//
// ELEMENT, defined in front of the text, says what a 16-bit word is: FLOAT16 or BFLOAT16.
// Where FLAME_HOST is defined a C++ compiler of the host runs the same kernels, a block at a time
// with threads as fibers: then each function is written in plain C++ over __shfl_sync, which is
// also its definition. A "warp's" function must be called by all 32 threads.
//
// Fragments of mma m16n8k16, for lane = 4 g + t (g in 0..7, t in 0..3); a register holds two
// neighbouring columns of A, rows of B:
//   A (16, 16): a0 = (g, 2t..), a1 = (g + 8, 2t..), a2 = (g, 2t + 8..), a3 = (g + 8, 2t + 8..)
//   B (16,  8): b0 = (2t.., g), b1 = (2t + 8.., g)
//   D (16,  8): d0 d1 = (g, 2t..), d2 d3 = (g + 8, 2t..), float32
// so two neighbouring D tiles, rounded, are an A tile: a product feeds the next without a shuffle.
#include "numbers.cuh"

#ifdef FLAME_HOST
// What each thread of a warp shows the others: written by all, then read by all, then gone. The
// table lies on the stack of lane 0, so all leave together.
struct HostTable {
  u64 word[32][6];
};

inline HostTable* host_table(HostTable& own) {
  return (HostTable*)__shfl_sync(0xffffffffu, (u64)&own, 0);
}
#endif

// --- shared memory -------------------------------------------------------------------------------

#ifdef FLAME_HOST
typedef unsigned char* SharedAddress;
typedef u64 AddressBits;
__device__ inline SharedAddress shared_address(void* place) { return (unsigned char*)place; }
#else
typedef u32 SharedAddress;
typedef u32 AddressBits;
__device__ __forceinline__ SharedAddress shared_address(void* place) {
  return (u32)__cvta_generic_to_shared(place);
}
#endif

// threadIdx.x, read anew at each call: what is made of it is then made again in each pass of a
// loop, where the compiler would keep it in registers that accumulators need.
__device__ __forceinline__ int thread_anew() {
#ifdef FLAME_HOST
  return (int)threadIdx.x;
#else
  int number;
  asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(number));
  return number;
#endif
}

// 16 bytes from device to shared memory, both 16-byte aligned; zeros where not `valid` (then
// `source` is not read). Complete after copy_wait and a barrier.
__device__ __forceinline__ void copy_16(SharedAddress target, const void* source, bool valid) {
#ifdef FLAME_HOST
  for (int i = 0; i < 16; ++i) target[i] = valid ? ((const unsigned char*)source)[i] : 0;
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(target), "l"(source),
               "r"(valid ? 16 : 0));
#endif
}

// As above, always valid.
__device__ __forceinline__ void copy_16(SharedAddress target, const void* source) {
#ifdef FLAME_HOST
  copy_16(target, source, true);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(target), "l"(source));
#endif
}

// As copy_16, of 4 bytes.
__device__ __forceinline__ void copy_4(SharedAddress target, const void* source, bool valid) {
#ifdef FLAME_HOST
  for (int i = 0; i < 4; ++i) target[i] = valid ? ((const unsigned char*)source)[i] : 0;
#else
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(target), "l"(source),
               "r"(valid ? 4 : 0));
#endif
}

// Closes a group of copies of this thread.
__device__ __forceinline__ void copy_commit() {
#ifndef FLAME_HOST
  asm volatile("cp.async.commit_group;\n" ::);
#endif
}

// Waits until at most `PENDING` of this thread's youngest groups are under way.
template <int PENDING>
__device__ __forceinline__ void copy_wait() {
#ifndef FLAME_HOST
  asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING) : "memory");
#endif
}

// --- matrices of 8 x 8 words of 16 bits ----------------------------------------------------------

// Four matrices: lanes 8 i .. 8 i + 7 give the addresses of the rows of matrix i, 16 bytes each.
// Register i of lane (g, t) gets columns 2t, 2t + 1 of row g of matrix i.
__device__ __forceinline__ void load_matrices(u32 (&found)[4], SharedAddress row) {
#ifdef FLAME_HOST
  const int lane = (int)(threadIdx.x % 32);
  HostTable own, *table = host_table(own);
  table->word[lane][0] = (u64)row;
  __syncwarp(0xffffffffu);
  for (int i = 0; i < 4; ++i) {
    const u16* words = (const u16*)table->word[8 * i + lane / 4][0] + 2 * (lane % 4);
    found[i] = words[0] | ((u32)words[1] << 16);
  }
  __syncwarp(0xffffffffu);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(found[0]), "=r"(found[1]), "=r"(found[2]), "=r"(found[3])
               : "r"(row));
#endif
}

// As load_matrices of the transposed matrices: rows 2t, 2t + 1 of column g of matrix i.
__device__ __forceinline__ void load_matrices_transposed(u32 (&found)[4], SharedAddress row) {
#ifdef FLAME_HOST
  const int lane = (int)(threadIdx.x % 32);
  HostTable own, *table = host_table(own);
  table->word[lane][0] = (u64)row;
  __syncwarp(0xffffffffu);
  for (int i = 0; i < 4; ++i) {
    const u16* even = (const u16*)table->word[8 * i + 2 * (lane % 4)][0];
    const u16* odd = (const u16*)table->word[8 * i + 2 * (lane % 4) + 1][0];
    found[i] = even[lane / 4] | ((u32)odd[lane / 4] << 16);
  }
  __syncwarp(0xffffffffu);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(found[0]), "=r"(found[1]), "=r"(found[2]), "=r"(found[3])
               : "r"(row));
#endif
}

// --- products ------------------------------------------------------------------------------------

// d (16, 8) = a (16, 16) b (16, 8), plus d unless FRESH; summed in float32. A warp's function.
template <bool FRESH = false>
__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#ifdef FLAME_HOST
  const int lane = (int)(threadIdx.x % 32), g = lane / 4, t = lane % 4;
  HostTable own, *table = host_table(own);
  for (int r = 0; r < 4; ++r) {
    table->word[lane][r] = a[r];
    if (FRESH) d[r] = 0.0f;
  }
  table->word[lane][4] = b0;
  table->word[lane][5] = b1;
  __syncwarp(0xffffffffu);
  for (int i = 0; i < 4; ++i)  // columns 2i, 2i + 1, 2i + 8, 2i + 9 of A
    for (int half = 0; half < 2; ++half)
      for (int r = 0; r < 2; ++r)
        for (int n = 0; n < 2; ++n) {
          const u32 x = (u32)table->word[4 * g + i][2 * half + r];
          const u32 y = (u32)table->word[4 * (2 * t + n) + i][4 + half];
          d[2 * r + n] += widen(x & 0xffff) * widen(y & 0xffff) + widen(x >> 16) * widen(y >> 16);
        }
  __syncwarp(0xffffffffu);
#else
#if ELEMENT == BFLOAT16
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#else
#define MMA "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#endif
  if (FRESH) {  // constant zeros need no registers
    asm volatile(MMA "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};\n"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
  } else {
    asm volatile(MMA "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#undef MMA
#endif
}
