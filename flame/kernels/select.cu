// The k smallest keys of lines, or of chunks of lines, in the order in which they stand.
//
// A block finds the k-th smallest key of its chunk digit by digit, from the highest: a histogram of
// one digit of those keys that agree with what is known so far says what the next digit is. Of
// several elements with that key the first ones are taken. So the choice does not depend on how
// threads run.
//
// PAIRS 0: x holds elements, of lines LINE0 with `step` between neighbours; 1: keys and index are
// given, line after line. Chunk c of a line is its elements from c * chunk on.

#include "keys.cuh"

typedef long long i64;
#define BLOCK 512
#define EACH 4
#include "blocks.cuh"

#if PAIRS
#define KEY_AT(i) given_keys[line * length + (i)]
#else
#define KEY_AT(i) key_of(x[base + (i) * step])
#endif

// Where a chunk has fewer than k elements, the rest of its k results is NO_KEY.
extern "C" __global__ void __launch_bounds__(BLOCK) select_smallest(
#if PAIRS
    const KEY* given_keys, const unsigned* given_index,
#else
    const T* x,
#endif
    KEY* out_keys, unsigned* out_index, i64 length, i64 chunk, i64 chunks, i64 k, i64 step
    LINE_PARAMS) {
  __shared__ int counts[256];
  __shared__ KEY chosen;
  __shared__ int wanted;
  i64 line = blockIdx.x / chunks;
  i64 first = blockIdx.x % chunks * chunk;
  i64 end = first + chunk < length ? first + chunk : length;
#if !PAIRS
  i64 base = LINE0(line);
#endif
  KEY* keys = out_keys + (i64)blockIdx.x * k;
  unsigned* index = out_index + (i64)blockIdx.x * k;
  int take = (int)(k < end - first ? k : end - first);
  for (int i = take + threadIdx.x; i < k; i += BLOCK) {
    keys[i] = NO_KEY;
    index[i] = ~0u;
  }
  KEY known = 0, mask = 0;
  int need = take;  // how many to take of the elements that agree with `known`
  for (int shift = BITS - 8; shift >= 0; shift -= 8) {
    if (threadIdx.x < 256) counts[threadIdx.x] = 0;
    __syncthreads();
    for (i64 i = first + threadIdx.x; i < end; i += BLOCK) {
      KEY key = KEY_AT(i);
      if ((key & mask) == known) atomicAdd(&counts[(int)(key >> shift) & 255], 1);
    }
    __syncthreads();
    int mine = threadIdx.x < 256 ? counts[threadIdx.x] : 0, total;
    int before = block_before(mine, &total);
    if (before < need && need <= before + mine) {
      chosen = (KEY)threadIdx.x << shift;
      wanted = need - before;
    }
    __syncthreads();
    known |= chosen;
    mask |= (KEY)255 << shift;
    need = wanted;
    __syncthreads();
  }
  // keys below `known` are all taken, and the first `need` of those that equal it
  int done_below = 0, done_equal = 0;
  for (i64 start = first; start < end && done_below + done_equal < take; start += BLOCK * EACH) {
    KEY here[EACH];
    int below = 0, equal = 0, total;
#pragma unroll
    for (int n = 0; n < EACH; n++) {
      i64 i = start + threadIdx.x * EACH + n;
      here[n] = i < end ? KEY_AT(i) : NO_KEY;
      if (i < end) {
        below += here[n] < known;
        equal += here[n] == known;
      }
    }
    int before = block_before(below | equal << 16, &total);
    int place_below = done_below + (before & 0xffff), place_equal = done_equal + (before >> 16);
#pragma unroll
    for (int n = 0; n < EACH; n++) {
      i64 i = start + threadIdx.x * EACH + n;
      if (i < end && (here[n] < known || (here[n] == known && place_equal < need))) {
        int place = place_below + (place_equal < need ? place_equal : need);
        keys[place] = here[n];
#if PAIRS
        index[place] = given_index[line * length + i];
#else
        index[place] = (unsigned)i;
#endif
      }
      if (i < end) {
        place_below += here[n] < known;
        place_equal += here[n] == known;
      }
    }
    done_below += total & 0xffff;
    done_equal += total >> 16;
    if (done_equal > need) done_equal = need;
  }
}
