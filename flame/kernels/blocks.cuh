// What the threads of a block do together. BLOCK: threads of a block, a multiple of 32.

// Sum of `value` over the threads before this one; *total: over all. Every thread calls it.
template <class V>
__device__ __forceinline__ V block_before(V value, V* total) {
  __shared__ V sums[33];
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  V sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    V other = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    V running = 0;
    for (int w = 0; w < BLOCK / 32; w++) {
      V mine = sums[w];
      sums[w] = running;
      running += mine;
    }
    sums[32] = running;
  }
  __syncthreads();
  V before = sums[warp] + sum - value;
  *total = sums[32];
  __syncthreads();
  return before;
}
