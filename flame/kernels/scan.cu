// Scans along lines: running sums, products, extremes, recurrences, and sums of segments.
//
// Each thread folds EACH neighbouring elements, the block scans what its threads found, and goes on
// to its next tile. Long lines are cut into chunks of a fixed size: one launch folds each chunk, one
// scans the chunks' results, one scans the chunks from there. So the order of combination is fixed
// by the sizes alone, and a scan gives the same bits on every run.
//
// OPERATION: what is folded, below. IN, OUT: elements; WIDE: what is computed with. REVERSE: lines
// are walked from their end. Line l of operand n starts at LINEn(l).

#if USES_HALF
#include <cuda_fp16.h>
#endif
#if USES_BFLOAT16
#include <cuda_bf16.h>
#endif

typedef long long i64;
#define THREADS 256
#define EACH 8
#define TILE (THREADS * EACH)

#define ADD 0
#define MULTIPLY 1
#define LOG_ADD_EXP 2
#define LAST_EXTREME 3
#define RECURRENCE 4
#define SEGMENTS 5

#include "combine.cuh"

#if OPERATION == ADD || OPERATION == MULTIPLY || OPERATION == LOG_ADD_EXP
#define SOURCES const IN* x
#define TARGETS OUT* out
#define STEPS i64 step, i64 out_step,
struct State { WIDE value; };
#if IS_DOUBLE
#define ENDLESS __longlong_as_double(0x7ff0000000000000ll)
#define EXP exp
#define LOG1P log1p
#else
#define ENDLESS __int_as_float(0x7f800000)
#define EXP expf
#define LOG1P log1pf
#endif

__device__ __forceinline__ State nothing() {
#if OPERATION == ADD
  return {(WIDE)0};
#elif OPERATION == MULTIPLY
  return {(WIDE)1};
#else
  return {-ENDLESS};
#endif
}
__device__ __forceinline__ State fold(State a, State b) {
#if OPERATION == ADD
  return {a.value + b.value};
#elif OPERATION == MULTIPLY
  return {a.value * b.value};
#else
  WIDE most = a.value > b.value ? a.value : b.value, least = a.value > b.value ? b.value : a.value;
  if (a.value != a.value || b.value != b.value) return {a.value + b.value};
  if (least == -ENDLESS || most == ENDLESS) return {most};
  return {most + LOG1P(EXP(least - most))};
#endif
}
#define READ(line, at) State{(WIDE)x[LINE0(line) + (at) * step]}
#define WRITE(line, at, state) out[LINE1(line) + (at) * out_step] = (OUT)(state).value
#endif

#if OPERATION == LAST_EXTREME
// The extreme and its place, of equal ones the last; a NaN stays.
#define SOURCES const IN* x
#define TARGETS OUT *out, i64 *places
#define STEPS i64 step, i64 out_step, i64 place_step,
struct State { WIDE value; i64 place; };

__device__ __forceinline__ State nothing() { return {(WIDE)0, -1}; }
__device__ __forceinline__ State fold(State a, State b) {
  if (a.place < 0) return b;
  if (b.place < 0) return a;
  bool later = (LARGEST ? b.value >= a.value : b.value <= a.value) || b.value != b.value;
  return later ? b : a;
}
#define READ(line, at) State{(WIDE)x[LINE0(line) + (at) * step], at}
#define WRITE(line, at, state)                                      \
  {                                                                 \
    out[LINE1(line) + (at) * out_step] = (OUT)(state).value;        \
    places[LINE2(line) + (at) * place_step] = (state).place;        \
  }
#endif

#if OPERATION == RECURRENCE
// y[i] = x[i] + factor[i] * y[i - 1], as the composition of maps y -> value + factor * y.
#define SOURCES const IN *x, const FACTOR *factors
#define TARGETS OUT* out
#define STEPS i64 step, i64 factor_step, i64 out_step,
struct State { WIDE value, factor; };

__device__ __forceinline__ State nothing() { return {(WIDE)0, (WIDE)1}; }
__device__ __forceinline__ State fold(State a, State b) {
  // products of factors may overflow where nothing is multiplied by them
  return {a.value == (WIDE)0 ? b.value : b.value + b.factor * a.value, a.factor * b.factor};
}
#define READ(line, at) \
  State{(WIDE)x[LINE0(line) + (at) * step], (WIDE)factors[LINE1(line) + (at) * factor_step]}
#define WRITE(line, at, state) out[LINE2(line) + (at) * out_step] = (OUT)(state).value
#endif

#if OPERATION == SEGMENTS
// Values in the order of sorted keys; what each run of equal keys gives is combined into out[key].
// The value of entry e in line l is x[ENTRY0(e) + LINE0(l)]. NO_KEY: nothing is written. PER_LINE:
// each line has its own keys and entries, line after line.
#define SOURCES const IN *x, const KEY *keys, const unsigned *entries
#define TARGETS OUT* out
#define STEPS
#define NO_KEY ((KEY)~0ull)
struct State { WIDE value; int begins, filled; };

__device__ __forceinline__ State nothing() { return {(WIDE)0, 0, 0}; }
__device__ __forceinline__ State fold(State a, State b) {
  if (!b.filled) return a;
  if (!a.filled || b.begins) return {b.value, a.begins | b.begins, 1};
  return {combined(a.value, b.value), a.begins, 1};
}
#define OWN(line) (PER_LINE ? (line) * length : 0)
#define READ(line, at)                                                              \
  State{(WIDE)x[ENTRY0(entries[OWN(line) + (at)]) + LINE0(line)],                   \
        (at) == 0 || keys[OWN(line) + (at) - 1] != keys[OWN(line) + (at)], 1}
#define WRITE(line, at, state)                                              \
  {                                                                         \
    const KEY* own = keys + OWN(line);                                      \
    KEY key = own[at];                                                      \
    if (key != NO_KEY && ((at) + 1 == length || own[(at) + 1] != key)) {    \
      OUT* place = out + (i64)key + LINE1(line);                            \
      *place = (OUT)combined((WIDE)*place, (state).value);                  \
    }                                                                       \
  }
#endif

// What the threads before this one hold, folded in order; *total: all of them.
__device__ __forceinline__ State fold_before(State own, State* total) {
  __shared__ State states[2][THREADS];
  int t = threadIdx.x, side = 0;
  states[0][t] = own;
  __syncthreads();
  for (int reach = 1; reach < THREADS; reach *= 2) {
    State mine = states[side][t];
    states[1 - side][t] = t >= reach ? fold(states[side][t - reach], mine) : mine;
    side = 1 - side;
    __syncthreads();
  }
  State before = t ? states[side][t - 1] : nothing();
  *total = states[side][THREADS - 1];
  __syncthreads();
  return before;
}

#define PLACE(i) (REVERSE ? length - 1 - (i) : (i))

// totals[line * chunks + c] = chunk c of the line, folded.
extern "C" __global__ void __launch_bounds__(THREADS) fold_chunks(
    SOURCES, State* totals, STEPS i64 length, i64 chunk, i64 chunks LINE_PARAMS ENTRY_PARAMS) {
  i64 line = blockIdx.x / chunks, first = blockIdx.x % chunks * chunk;
  i64 end = first + chunk < length ? first + chunk : length;
  State running = nothing();
  for (i64 start = first; start < end; start += TILE) {
    State own = nothing(), total;
#pragma unroll
    for (int n = 0; n < EACH; n++) {
      i64 i = start + threadIdx.x * EACH + n;
      if (i < end) own = fold(own, READ(line, PLACE(i)));
    }
    fold_before(own, &total);
    running = fold(running, total);
  }
  if (threadIdx.x == 0) totals[blockIdx.x] = running;
}

// Each line's totals become what stands before their chunk.
extern "C" __global__ void __launch_bounds__(THREADS) scan_totals(
    State* totals, i64 chunks LINE_PARAMS ENTRY_PARAMS) {
  State* line = totals + blockIdx.x * chunks;
  State running = nothing();
  for (i64 start = 0; start < chunks; start += THREADS) {
    i64 i = start + threadIdx.x;
    State own = i < chunks ? line[i] : nothing(), total;
    State before = fold_before(own, &total);
    if (i < chunks) line[i] = fold(running, before);
    running = fold(running, total);
  }
}

// The scan of a chunk. totals: what stands before each; not read where a chunk is a whole line.
extern "C" __global__ void __launch_bounds__(THREADS) scan_chunks(
    SOURCES, TARGETS, const State* totals, STEPS i64 length, i64 chunk, i64 chunks LINE_PARAMS
    ENTRY_PARAMS) {
  i64 line = blockIdx.x / chunks, first = blockIdx.x % chunks * chunk;
  i64 end = first + chunk < length ? first + chunk : length;
  State running = chunks > 1 ? totals[blockIdx.x] : nothing();
  for (i64 start = first; start < end; start += TILE) {
    State here[EACH], own = nothing(), total;
#pragma unroll
    for (int n = 0; n < EACH; n++) {
      i64 i = start + threadIdx.x * EACH + n;
      here[n] = i < end ? READ(line, PLACE(i)) : nothing();
      own = fold(own, here[n]);
    }
    State state = fold(running, fold_before(own, &total));
    running = fold(running, total);
#pragma unroll
    for (int n = 0; n < EACH; n++) {
      i64 i = start + threadIdx.x * EACH + n;
      state = fold(state, here[n]);
      if (i < end) WRITE(line, PLACE(i), state);
    }
  }
}
