// Stable sorting of lines by merging.
//
// A tile of elements is sorted in shared memory; longer lines then take passes that merge pairs of
// sorted runs. Every block of a pass writes one tile of the result: where the two runs are cut for
// it is found by binary search (Odeh et al., "Merge path", 2012), so one long line keeps the whole
// device busy. Equal keys: the left run first, which is what keeps the order stable.
//
// PAIRS 0: x holds elements, of lines LINE0 with `step` between neighbours; 1: keys and index are
// given, line after line. FINAL 1: the first `limit` indices of each line go to lines LINE1 of
// `out`; 0: all keys and indices go to temporaries, line after line.

#include "keys.cuh"

typedef long long i64;
#define THREADS 256
#define ITEMS 8
#define TILE (THREADS * ITEMS)
#define PAD(i) ((i) + ((i) >> 5))  // keeps a thread's neighbouring elements off the others' banks

struct Tile {
  KEY keys[PAD(TILE) + 1];
  unsigned index[PAD(TILE) + 1];
};

// How many of the first `diagonal` merged elements come from a, of na, and not from b, of nb.
__device__ __forceinline__ int shared_cut(const KEY* keys, int a, int na, int b, int nb, int diagonal) {
  int low = diagonal > nb ? diagonal - nb : 0, high = diagonal < na ? diagonal : na;
  while (low < high) {
    int middle = (low + high) >> 1;
    if (keys[PAD(a + middle)] <= keys[PAD(b + diagonal - 1 - middle)]) low = middle + 1;
    else high = middle;
  }
  return low;
}

__device__ __forceinline__ i64 global_cut(const KEY* a, i64 na, const KEY* b, i64 nb, i64 diagonal) {
  i64 low = diagonal > nb ? diagonal - nb : 0, high = diagonal < na ? diagonal : na;
  while (low < high) {
    i64 middle = (low + high) >> 1;
    if (a[middle] <= b[diagonal - 1 - middle]) low = middle + 1;
    else high = middle;
  }
  return low;
}

// Merges ITEMS elements from place `diagonal` on of the runs a and b of the tile into registers.
__device__ __forceinline__ void merge_items(
    const Tile& tile, int a, int na, int b, int nb, int diagonal, KEY* keys, unsigned* index) {
  int i = shared_cut(tile.keys, a, na, b, nb, diagonal), j = diagonal - i;
  KEY left = i < na ? tile.keys[PAD(a + i)] : NO_KEY;
  KEY right = j < nb ? tile.keys[PAD(b + j)] : NO_KEY;
#pragma unroll
  for (int n = 0; n < ITEMS; n++) {
    bool from_a = j >= nb || (i < na && left <= right);
    keys[n] = from_a ? left : right;
    index[n] = i < na || j < nb ? tile.index[PAD(from_a ? a + i : b + j)] : ~0u;
    if (from_a) {
      i++;
      left = i < na ? tile.keys[PAD(a + i)] : NO_KEY;
    } else {
      j++;
      right = j < nb ? tile.keys[PAD(b + j)] : NO_KEY;
    }
  }
}

__device__ __forceinline__ void keep_items(Tile& tile, const KEY* keys, const unsigned* index) {
  int first = threadIdx.x * ITEMS;
#pragma unroll
  for (int n = 0; n < ITEMS; n++) {
    tile.keys[PAD(first + n)] = keys[n];
    tile.index[PAD(first + n)] = index[n];
  }
}

// Sorts the segments of the tile, each a power of two >= ITEMS long.
__device__ __forceinline__ void sort_tile(Tile& tile, int segment) {
  KEY keys[ITEMS];
  unsigned index[ITEMS];
  int first = threadIdx.x * ITEMS;
#pragma unroll
  for (int n = 0; n < ITEMS; n++) {
    keys[n] = tile.keys[PAD(first + n)];
    index[n] = tile.index[PAD(first + n)];
  }
#pragma unroll
  for (int round = 0; round < ITEMS; round++) {  // neighbours only, so equal keys never pass
#pragma unroll
    for (int n = round & 1; n + 1 < ITEMS; n += 2) {
      if (keys[n + 1] < keys[n]) {
        KEY key = keys[n]; keys[n] = keys[n + 1]; keys[n + 1] = key;
        unsigned place = index[n]; index[n] = index[n + 1]; index[n + 1] = place;
      }
    }
  }
  __syncthreads();
  keep_items(tile, keys, index);
  __syncthreads();
  for (int run = ITEMS; run < segment; run *= 2) {
    int group = first & ~(2 * run - 1);
    merge_items(tile, group, run, group + run, run, first - group, keys, index);
    __syncthreads();
    keep_items(tile, keys, index);
    __syncthreads();
  }
}

// One tile of the lines of x: several short lines, or a part of a long one.
extern "C" __global__ void __launch_bounds__(THREADS) sort_tiles(
#if PAIRS
    const KEY* given_keys, const unsigned* given_index,
#else
    const T* x,
#endif
#if FINAL
    i64* out,
#else
    KEY* out_keys, unsigned* out_index,
#endif
    i64 lines, i64 length, i64 segment, i64 tiles, i64 step, i64 out_step, i64 limit
    LINE_PARAMS) {
  __shared__ Tile tile;
  int per_block = TILE / (int)segment;
  i64 line = tiles > 1 ? blockIdx.x / tiles : (i64)blockIdx.x * per_block;
  i64 start = tiles > 1 ? blockIdx.x % tiles * TILE : 0;
  for (int i = threadIdx.x; i < TILE; i += THREADS) {
    i64 row = line + i / (int)segment, at = start + i % (int)segment;
    bool there = row < lines && at < length;
#if PAIRS
    tile.keys[PAD(i)] = there ? given_keys[row * length + at] : NO_KEY;
    tile.index[PAD(i)] = there ? given_index[row * length + at] : ~0u;
#else
    tile.keys[PAD(i)] = there ? key_of(x[LINE0(row) + at * step]) : NO_KEY;
    tile.index[PAD(i)] = (unsigned)at;
#endif
  }
  __syncthreads();
  sort_tile(tile, (int)segment);
  for (int i = threadIdx.x; i < TILE; i += THREADS) {
    i64 row = line + i / (int)segment, at = start + i % (int)segment;
    if (row >= lines || at >= length) continue;
#if FINAL
    if (at < limit) out[LINE1(row) + at * out_step] = tile.index[PAD(i)];
#else
    out_keys[row * length + at] = tile.keys[PAD(i)];
    out_index[row * length + at] = tile.index[PAD(i)];
#endif
  }
}

// One tile of the result of merging neighbouring sorted runs of `run` elements, a multiple of TILE.
extern "C" __global__ void __launch_bounds__(THREADS) merge_runs(
    const KEY* keys, const unsigned* index,
#if FINAL
    i64* out,
#else
    KEY* out_keys, unsigned* out_index,
#endif
    i64 length, i64 run, i64 tiles, i64 out_step, i64 limit LINE_PARAMS) {
  __shared__ Tile tile;
  __shared__ i64 cuts[2];
  i64 line = blockIdx.x / tiles, start = blockIdx.x % tiles * TILE;
  if (start >= limit) return;
  i64 group = start / (2 * run) * (2 * run);
  i64 left_end = group + run < length ? group + run : length;
  i64 right_end = group + 2 * run < length ? group + 2 * run : length;
  const KEY* left = keys + line * length + group;
  const KEY* right = keys + line * length + left_end;
  i64 nl = left_end - group, nr = right_end - left_end;
  i64 first = start - group, last = first + TILE < nl + nr ? first + TILE : nl + nr;
  if (threadIdx.x < 2) cuts[threadIdx.x] = global_cut(left, nl, right, nr, threadIdx.x ? last : first);
  __syncthreads();
  i64 a = cuts[0], b = first - a;
  int na = (int)(cuts[1] - a), nb = (int)(last - first) - na;
  const unsigned* left_index = index + line * length + group;
  const unsigned* right_index = index + line * length + left_end;
  for (int i = threadIdx.x; i < na + nb; i += THREADS) {
    tile.keys[PAD(i)] = i < na ? left[a + i] : right[b + i - na];
    tile.index[PAD(i)] = i < na ? left_index[a + i] : right_index[b + i - na];
  }
  __syncthreads();
  KEY merged[ITEMS];
  unsigned places[ITEMS];
  int diagonal = threadIdx.x * ITEMS;
  if (diagonal < na + nb) merge_items(tile, 0, na, na, nb, diagonal, merged, places);
  __syncthreads();
  if (diagonal < na + nb) keep_items(tile, merged, places);
  __syncthreads();
  for (int i = threadIdx.x; i < na + nb; i += THREADS) {
#if FINAL
    if (start + i < limit) out[LINE1(line) + (start + i) * out_step] = tile.index[PAD(i)];
#else
    out_keys[line * length + start + i] = tile.keys[PAD(i)];
    out_index[line * length + start + i] = tile.index[PAD(i)];
#endif
  }
}
