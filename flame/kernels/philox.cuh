// Random bits by counter: Philox4x32-10 (Salmon, Moraes, Dror and Shaw, 2011), the same bits as
// flame.ops.philox: a block's counter is (block, 0), its key the seed, both of 64 bits.
//
// Four elements share a block: the element at `position` takes word position / 16 % 4 of block
// offset + position / 64 * 16 + position % 16.
#include "numbers.cuh"

struct Words {
  u32 word[4];
};

// Both halves of a product by one instruction: the compiler would make two.
__device__ __forceinline__ u64 product_of(u32 a, u32 b) {
#ifdef __CUDA_ARCH__
  u64 made;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(made) : "r"(a), "r"(b));
  return made;
#else
  return (u64)a * b;
#endif
}

__device__ __forceinline__ Words random_words(u64 seed, u64 block) {
  u32 a = (u32)block, b = (u32)(block >> 32), c = 0, d = 0;
  u32 low_key = (u32)seed, high_key = (u32)(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const u64 product = product_of(0xD2511F53u, a), other = product_of(0xCD9E8D57u, c);
    a = (u32)(other >> 32) ^ b ^ low_key;
    b = (u32)other;
    c = (u32)(product >> 32) ^ d ^ high_key;
    d = (u32)product;
    low_key += 0x9E3779B9u;
    high_key += 0xBB67AE85u;
  }
  return Words{{a, b, c, d}};
}
