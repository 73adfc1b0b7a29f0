// Scans along lines: running sums, products, extremes, recurrences, and sums of segments.
//
// A line is taken in tiles. A tile has ROWS rows, and of each row every thread holds PACK neighbouring
// elements, next to those of its neighbours: where the line is dense and its place suits, they are
// read and written at once. Long lines are cut into chunks of a fixed size: one launch folds each
// chunk, one scans the chunks' results, one scans the chunks from there. So the order of combination
// is fixed by sizes and dtypes alone, not by addresses, and a scan gives the same bits on every run.
//
// A target may be the memory of a source (but of SEGMENTS): each element is read by the thread that
// writes it, before.
//
// OPERATION: what is folded, below. IN, OUT: elements; WIDE: what is computed with. REVERSE: lines
// are walked from their end. Line l of operand n starts at LINEn(l). DENSE: all steps are 1. THREADS
// take a line, or a chunk, together; where they are a warp, a block has several of them, and nobody
// waits at barriers.

#if USES_HALF
#include <cuda_fp16.h>
#endif
#if USES_BFLOAT16
#include <cuda_bf16.h>
#endif

typedef long long i64;
#define EACH 8  // elements that a thread has of a tile
#define ROWS (EACH / PACK)
#define TILE (THREADS * EACH)
#define WARPS (THREADS / 32)
#define TEAMS (THREADS == 32 ? 4 : 1)  // in a block
#define EVERYONE 0xffffffffu

#define ADD 0
#define MULTIPLY 1
#define LOG_ADD_EXP 2
#define LAST_EXTREME 3
#define RECURRENCE 4
#define SEGMENTS 5

#include "combine.cuh"

#define PLACE(i) (REVERSE ? length - 1 - (i) : (i))

// Neighbours of a line in the order in which it is walked.
template <class T>
struct alignas(PACK * sizeof(T)) Pack { T items[PACK]; };

template <class T>
__device__ __forceinline__ Pack<T> walked(Pack<T> pack) {
  Pack<T> turned;
#pragma unroll
  for (int n = 0; n < PACK; n++) turned.items[n] = pack.items[REVERSE ? PACK - 1 - n : n];
  return turned;
}

// Where in memory the pack from place i on begins.
#define BEGIN(line) ((line) + (REVERSE ? length - PACK - i : i))

// Whether a pack of which `left` elements are wanted can be had at once.
template <class T>
__device__ __forceinline__ bool is_whole(const T* begin, int left) {
  return DENSE && left >= PACK && (unsigned long long)begin % sizeof(Pack<T>) == 0;
}

// The elements of a line from place i on, at most `left` of them, then zeros.
template <class T>
__device__ __forceinline__ Pack<T> take(const T* line, i64 step, i64 i, int left, i64 length) {
  const T* begin = BEGIN(line);
  if (is_whole(begin, left)) return walked(*(const Pack<T>*)begin);
  Pack<T> pack{};
#pragma unroll
  for (int n = 0; n < PACK; n++)
    if (n < left) pack.items[n] = line[PLACE(i + n) * (DENSE ? 1 : step)];
  return pack;
}

// A store that stays one: the compiler splits a plain one, to share its parts with the element-wise
// stores of the other branch.
template <int BYTES> struct Word;
template <> struct Word<16> { using Type = uint4; };
template <> struct Word<8> { using Type = uint2; };
template <> struct Word<4> { using Type = unsigned; };
template <> struct Word<2> { using Type = unsigned short; };
template <class T>
__device__ __forceinline__ void store_whole(T* begin, Pack<T> pack) {
  typename Word<sizeof pack>::Type word;
  memcpy(&word, &pack, sizeof pack);
  __stwb((decltype(word)*)begin, word);
}

template <class T>
__device__ __forceinline__ void give(T* line, i64 step, i64 i, int left, i64 length, Pack<T> pack) {
  T* begin = BEGIN(line);
  if (is_whole(begin, left)) {
    store_whole(begin, walked(pack));
    return;
  }
#pragma unroll
  for (int n = 0; n < PACK; n++)
    if (n < left) line[PLACE(i + n) * (DENSE ? 1 : step)] = pack.items[n];
}

// Of each operation: State, which is folded, and MEMBERS, a function of each member; Taken and Given,
// what a thread reads and writes of a row. TO_SOURCES and TO_TARGETS move pointers to a line.

#if OPERATION == ADD || OPERATION == MULTIPLY || OPERATION == LOG_ADD_EXP
#define SOURCES const IN* x
#define TARGETS OUT* out
#define STEPS i64 step, i64 out_step,
struct State { WIDE value; };
#define MEMBERS(f) {f(value)}
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
#define TO_SOURCES(line) x += LINE0(line)
#define TO_TARGETS(line) out += LINE1(line)
struct Taken { Pack<IN> x; };
struct Given { Pack<OUT> out; };
#define TAKE(taken, i, left) taken.x = take(x, step, i, left, length)
#define STATE(taken, n, i) State{(WIDE)taken.x.items[n]}
#define SET(given, n, state) given.out.items[n] = (OUT)state.value
#define GIVE(given, i, left) give(out, out_step, i, left, length, given.out)
#endif

#if OPERATION == LAST_EXTREME
// The extreme and its place, of equal ones the last; a NaN stays. AT: an integer for places.
#define SOURCES const IN* x
#define TARGETS OUT *out, i64 *places
#define STEPS i64 step, i64 out_step, i64 place_step,
struct State { WIDE value; AT place; };
#define MEMBERS(f) {f(value), f(place)}

__device__ __forceinline__ State nothing() { return {(WIDE)0, -1}; }
__device__ __forceinline__ State fold(State a, State b) {
  if (a.place < 0) return b;
  if (b.place < 0) return a;
  bool later = (LARGEST ? b.value >= a.value : b.value <= a.value) || b.value != b.value;
  return later ? b : a;
}
#define TO_SOURCES(line) x += LINE0(line)
#define TO_TARGETS(line) (out += LINE1(line), places += LINE2(line))
struct Taken { Pack<IN> x; };
struct Given { Pack<OUT> out; Pack<i64> places; };
#define TAKE(taken, i, left) taken.x = take(x, step, i, left, length)
#define STATE(taken, n, i) State{(WIDE)taken.x.items[n], (AT)PLACE(i + n)}
#define SET(given, n, state) \
  (given.out.items[n] = (OUT)state.value, given.places.items[n] = state.place)
#define GIVE(given, i, left)                              \
  (give(out, out_step, i, left, length, given.out),       \
   give(places, place_step, i, left, length, given.places))
#endif

#if OPERATION == RECURRENCE
// y[i] = x[i] + factor[i] * y[i - 1], as the composition of maps y -> value + factor * y.
#define SOURCES const IN *x, const FACTOR *factors
#define TARGETS OUT* out
#define STEPS i64 step, i64 factor_step, i64 out_step,
struct State { WIDE value, factor; };
#define MEMBERS(f) {f(value), f(factor)}

__device__ __forceinline__ State nothing() { return {(WIDE)0, (WIDE)1}; }
__device__ __forceinline__ State fold(State a, State b) {
  // products of factors may overflow where nothing is multiplied by them
  return {a.value == (WIDE)0 ? b.value : b.value + b.factor * a.value, a.factor * b.factor};
}
#define TO_SOURCES(line) (x += LINE0(line), factors += LINE1(line))
#define TO_TARGETS(line) out += LINE2(line)
struct Taken { Pack<IN> x; Pack<FACTOR> factors; };
struct Given { Pack<OUT> out; };
#define TAKE(taken, i, left)                       \
  (taken.x = take(x, step, i, left, length),       \
   taken.factors = take(factors, factor_step, i, left, length))
#define STATE(taken, n, i) State{(WIDE)taken.x.items[n], (WIDE)taken.factors.items[n]}
#define SET(given, n, state) given.out.items[n] = (OUT)state.value
#define GIVE(given, i, left) give(out, out_step, i, left, length, given.out)
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
#define MEMBERS(f) {f(value), f(begins), f(filled)}

__device__ __forceinline__ State nothing() { return {(WIDE)0, 0, 0}; }
__device__ __forceinline__ State fold(State a, State b) {
  if (!b.filled) return a;
  if (!a.filled || b.begins) return {b.value, a.begins | b.begins, 1};
  return {combined(a.value, b.value), a.begins, 1};
}
#define OWN(line) (PER_LINE ? (line) * length : 0)
#define TO_SOURCES(line) (x += LINE0(line), keys += OWN(line), entries += OWN(line))
#define TO_TARGETS(line) out += LINE1(line)
struct Taken { Pack<IN> x; bool begins[PACK]; };
struct Given { WIDE values[PACK]; };
#define TAKE(taken, i, left)                                                        \
  _Pragma("unroll") for (int n = 0; n < PACK; n++) if (n < left) {                  \
    taken.x.items[n] = x[ENTRY0(entries[i + n])];                                   \
    taken.begins[n] = i + n == 0 || keys[i + n - 1] != keys[i + n];                 \
  }
#define STATE(taken, n, i) State{(WIDE)taken.x.items[n], taken.begins[n], 1}
#define SET(given, n, state) given.values[n] = state.value
#define GIVE(given, i, left)                                                        \
  _Pragma("unroll") for (int n = 0; n < PACK; n++) if (n < left) {                  \
    KEY key = keys[i + n];                                                          \
    if (key != NO_KEY && (i + n + 1 == length || keys[i + n + 1] != key))           \
      out[(i64)key] = (OUT)combined((WIDE)out[(i64)key], given.values[n]);          \
  }
#endif

// The member of a lane's state: of one `by` lanes before, of lane `of`.
template <class M>
__device__ __forceinline__ M lane_before(M member, int by) {
  return (M)__shfl_up_sync(EVERYONE, member, by);
}
template <class M>
__device__ __forceinline__ M lane_at(M member, int of) {
  return (M)__shfl_sync(EVERYONE, member, of);
}
__device__ __forceinline__ State before(State state, int by) {
#define FROM(member) lane_before(state.member, by)
  return MEMBERS(FROM);
#undef FROM
}
__device__ __forceinline__ State at(State state, int lane) {
#define FROM(member) lane_at(state.member, lane)
  return MEMBERS(FROM);
#undef FROM
}

// Each lane's state becomes the fold of those up to it.
__device__ __forceinline__ State fold_lanes(State state, int lane) {
#pragma unroll
  for (int reach = 1; reach < 32; reach *= 2) {
    State other = before(state, reach);
    if (lane >= reach) state = fold(other, state);
  }
  return state;
}

// states: what each thread holds of each row; becomes what stands before that in the tile. All of
// the tile is returned. room: not what the call before this one was given, or a warp could be late
// to read there; WARPS states for each row.
template <int N>
__device__ __forceinline__ State fold_before(State (&states)[N], State* room) {
  static_assert(N * WARPS <= 32, "a warp folds what all of them found");
  const int lane = threadIdx.x % 32, warp = threadIdx.x % THREADS / 32;
  State total = nothing();
#pragma unroll
  for (int r = 0; r < N; r++) states[r] = fold_lanes(states[r], lane);
#if WARPS > 1
  if (lane == 31) {
#pragma unroll
    for (int r = 0; r < N; r++) room[r * WARPS + warp] = states[r];
  }
  __syncthreads();
  State found = fold_lanes(lane < N * WARPS ? room[lane] : nothing(), lane);
  total = at(found, N * WARPS - 1);
#endif
#pragma unroll
  for (int r = 0; r < N; r++) {
    State own = before(states[r], 1);
    if (lane == 0) own = nothing();
#if WARPS > 1
    State others = at(found, (r * WARPS + warp + 31) % 32);
    states[r] = r + warp ? fold(others, own) : own;
#else
    State row = at(states[r], 31);
    states[r] = fold(total, own);
    total = fold(total, row);
#endif
  }
  return total;
}

// A thread's place in row r of a tile, and how many elements of `tile` are there, or more.
#define OF_ROW(r) (int)(((r) * THREADS + threadIdx.x % THREADS) * PACK)
#define LEFT(r) (tile - OF_ROW(r))

// Which line and chunk these threads take, of `parts`, and then what they find in a tile of it.
#define FIND_PART                                                             \
  const unsigned part = blockIdx.x * TEAMS + threadIdx.x / THREADS;           \
  if (TEAMS > 1 && part >= parts) return;                                     \
  const i64 line = part / (unsigned)chunks;                                   \
  const i64 first = part % (unsigned)chunks * chunk;                          \
  const i64 end = first + chunk < length ? first + chunk : length;            \
  __shared__ State room[2][ROWS * WARPS];                                     \
  int side = 0;                                                               \
  TO_SOURCES(line)
#define TAKE_TILE                                                             \
  const int tile = end - start < TILE ? (int)(end - start) : TILE;            \
  Taken taken[ROWS];                                                          \
  State states[ROWS];                                                         \
  _Pragma("unroll") for (int r = 0; r < ROWS; r++)                            \
    TAKE(taken[r], (start + OF_ROW(r)), LEFT(r));                             \
  _Pragma("unroll") for (int r = 0; r < ROWS; r++) {                          \
    State own = nothing();                                                    \
    _Pragma("unroll") for (int n = 0; n < PACK; n++) if (n < LEFT(r))         \
      own = fold(own, STATE(taken[r], n, (start + OF_ROW(r))));               \
    states[r] = own;                                                          \
  }

// totals[part] = chunk part % chunks of line part / chunks, folded.
extern "C" __global__ void __launch_bounds__(THREADS * TEAMS) fold_chunks(
    SOURCES, State* totals, STEPS i64 length, i64 chunk, i64 chunks, i64 parts LINE_PARAMS
    ENTRY_PARAMS) {
  FIND_PART;
  State running = nothing();
  for (i64 start = first; start < end; start += TILE, side ^= 1) {
    TAKE_TILE;
    running = fold(running, fold_before(states, room[side]));
  }
  if (threadIdx.x % THREADS == 0) totals[part] = running;
}

// Each line's totals become what stands before their chunk.
extern "C" __global__ void __launch_bounds__(THREADS) scan_totals(
    State* totals, i64 chunks LINE_PARAMS ENTRY_PARAMS) {
  __shared__ State room[2][WARPS];
  State* line = totals + blockIdx.x * chunks;
  State running = nothing();
  int side = 0;
  for (i64 start = 0; start < chunks; start += THREADS, side ^= 1) {
    i64 i = start + threadIdx.x;
    State states[1] = {i < chunks ? line[i] : nothing()};
    State total = fold_before(states, room[side]);
    if (i < chunks) line[i] = fold(running, states[0]);
    running = fold(running, total);
  }
}

// The scan of a chunk. totals: what stands before each; not read where a chunk is a whole line.
extern "C" __global__ void __launch_bounds__(THREADS * TEAMS) scan_chunks(
    SOURCES, TARGETS, const State* totals, STEPS i64 length, i64 chunk, i64 chunks, i64 parts
    LINE_PARAMS ENTRY_PARAMS) {
  FIND_PART;
  TO_TARGETS(line);
  State running = chunks > 1 ? totals[part] : nothing();
  for (i64 start = first; start < end; start += TILE, side ^= 1) {
    TAKE_TILE;
    State total = fold_before(states, room[side]);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      State state = fold(running, states[r]);
      Given given;
#pragma unroll
      for (int n = 0; n < PACK; n++) {
        state = fold(state, STATE(taken[r], n, (start + OF_ROW(r))));
        SET(given, n, state);
      }
      GIVE(given, (start + OF_ROW(r)), LEFT(r));
    }
    running = fold(running, total);
  }
}
