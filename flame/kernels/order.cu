// What is read off sorted lines: medians, most frequent values, places of values.
//
// keys and index: sorted lines of `length` elements, line after line, as sort.cu leaves them.

#include "keys.cuh"

typedef long long i64;

// The first place of a sorted run whose key is not below (RIGHT: is above) the key.
__device__ __forceinline__ i64 first_not_below(const KEY* keys, i64 count, KEY key, bool right) {
  i64 low = 0, high = count;
  while (low < high) {
    i64 middle = (low + high) >> 1;
    if (right ? keys[middle] <= key : keys[middle] < key) low = middle + 1;
    else high = middle;
  }
  return low;
}

// Where the lower median stands; the first NaN where there is one and SKIP_NAN is 0.
extern "C" __global__ void pick_median(
    const KEY* keys, const unsigned* index, i64* out, i64 lines, i64 length LINE_PARAMS) {
  i64 line = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (line >= lines) return;
  i64 count = length;
#if KIND == 2
  count = first_not_below(keys + line * length, length, NAN_KEY, false);
#endif
  i64 at = SKIP_NAN ? (count > 0 ? count - 1 : 0) / 2 : count < length ? count : (length - 1) / 2;
  out[LINE0(line)] = index[line * length + at];
}

// best[line]: (length of the longest run of equal keys, minus the place of its end), which are
// compared as one number; the order of the atomic maxima does not matter.
extern "C" __global__ void longest_run(
    const KEY* keys, unsigned long long* best, i64 lines, i64 length LINE_PARAMS) {
  i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= lines * length) return;
  i64 line = at / length, i = at % length;
  const KEY* row = keys + line * length;
  KEY key = row[i];
  if (i + 1 < length && row[i + 1] == key) return;
  i64 begin = first_not_below(row, i, key, false);
  unsigned long long found = (unsigned long long)(i - begin + 1) << 32 | (0xffffffffu - (unsigned)i);
  atomicMax(best + line, found);
}

extern "C" __global__ void pick_mode(
    const unsigned long long* best, const unsigned* index, i64* out, i64 lines, i64 length
    LINE_PARAMS) {
  i64 line = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (line < lines) out[LINE0(line)] = index[line * length + (0xffffffffu - (unsigned)best[line])];
}

// Whether the elements of x are among the `count` sorted keys.
extern "C" __global__ void find_members(
    const T* x, const KEY* keys, unsigned char* out, i64 elements, i64 count, i64 invert
    LINE_PARAMS) {
  i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= elements) return;
  KEY key = key_of(x[LINE0(i)]);
  i64 at = first_not_below(keys, count, key, false);
  bool found = at < count && keys[at] == key;
#if KIND == 2
  found = found && key != NAN_KEY;
#endif
  out[LINE1(i)] = found != (invert != 0);
}

// Where each element of x would be inserted into its line of `edges`, in the order of the keys.
extern "C" __global__ void find_places(
    const T* edges, const T* x, i64* out, i64 elements, i64 count, i64 step, i64 right
    LINE_PARAMS) {
  i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= elements) return;
  KEY key = key_of(x[LINE1(i)]);
  const T* line = edges + LINE0(i);
  i64 low = 0, high = count;
  while (low < high) {
    i64 middle = (low + high) >> 1;
    KEY edge = key_of(line[middle * step]);
    if (right ? edge <= key : edge < key) low = middle + 1;
    else high = middle;
  }
  out[LINE2(i)] = low;
}
