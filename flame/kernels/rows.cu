// Rows of values combined into rows of a table, in the order of sorted keys.
//
// Column c of entry e is x[ENTRY0(e) + LINE0(c)]; it goes to out[key + LINE1(c)]. Entries with equal
// keys stand side by side, in their order; NO_KEY: nothing is written. PER_LINE: each column has its
// own keys and entries, column after column.

#if USES_HALF
#include <cuda_fp16.h>
#endif
#if USES_BFLOAT16
#include <cuda_bf16.h>
#endif
#include "combine.cuh"

typedef long long i64;
#define THREADS 128
#define NO_KEY ((KEY)~0ull)

// The last entry of each key is what stays.
extern "C" __global__ void __launch_bounds__(THREADS) set_rows(
    const IN* x, const KEY* keys, const unsigned* entries, OUT* out, i64 count, i64 columns
    LINE_PARAMS ENTRY_PARAMS) {
  i64 i = (i64)blockIdx.x * THREADS + threadIdx.x;
  if (i >= count * columns) return;
#if PER_LINE
  i64 c = i / count, at = i % count;
  keys += c * count;
  entries += c * count;
#else
  i64 at = i / columns, c = i % columns;
#endif
  KEY key = keys[at];
  if (key == NO_KEY || (at + 1 < count && keys[at + 1] == key)) return;
  out[(i64)key + LINE1(c)] = x[ENTRY0(entries[at]) + LINE0(c)];
}

// The entries of a chunk, folded key by key. A key that this chunk shares with the one before it
// leaves its result in heads, one that goes on in the next chunk in tails; a key all alone in a
// chunk that it shares on both sides leaves it in heads. All other keys are finished here.
extern "C" __global__ void __launch_bounds__(THREADS) fold_rows(
    const IN* x, const KEY* keys, const unsigned* entries, OUT* out, WIDE* heads, WIDE* tails,
    i64 count, i64 columns, i64 chunk, i64 blocks LINE_PARAMS ENTRY_PARAMS) {
  i64 c = blockIdx.x % blocks * THREADS + threadIdx.x, number = blockIdx.x / blocks;
  if (c >= columns) return;
  i64 first = number * chunk, end = first + chunk < count ? first + chunk : count;
  const i64 from = LINE0(c), to = LINE1(c);
  bool shared = first > 0 && keys[first - 1] == keys[first];
  for (i64 at = first; at < end;) {
    KEY key = keys[at];
    if (key == NO_KEY) return;  // the largest key: nothing follows
    WIDE sum = (WIDE)x[ENTRY0(entries[at]) + from];
    for (at++; at < end && keys[at] == key; at++)
      sum = combined(sum, (WIDE)x[ENTRY0(entries[at]) + from]);
    bool goes_on = at == end && at < count && keys[at] == key;
    if (shared) heads[number * columns + c] = sum;
    else if (goes_on) tails[number * columns + c] = sum;
    else {
      OUT* place = out + (i64)key + to;
      *place = (OUT)combined((WIDE)*place, sum);
    }
    shared = false;
  }
}

// The keys that begin in a chunk and go on in the next one: their parts, folded in order.
extern "C" __global__ void __launch_bounds__(THREADS) join_rows(
    const KEY* keys, OUT* out, const WIDE* heads, const WIDE* tails, i64 count, i64 columns,
    i64 chunk, i64 blocks LINE_PARAMS ENTRY_PARAMS) {
  i64 c = blockIdx.x % blocks * THREADS + threadIdx.x, number = blockIdx.x / blocks;
  i64 end = (number + 1) * chunk;
  if (c >= columns || end >= count) return;
  KEY key = keys[end];
  if (key == NO_KEY || keys[end - 1] != key) return;
  i64 first = number * chunk;
  if (first > 0 && keys[first - 1] == key) return;  // it began earlier
  WIDE sum = tails[number * columns + c];
  for (i64 next = number + 1; next * chunk < count && keys[next * chunk] == key; next++)
    sum = combined(sum, heads[next * columns + c]);
  OUT* place = out + (i64)key + LINE1(c);
  *place = (OUT)combined((WIDE)*place, sum);
}
