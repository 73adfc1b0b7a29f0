// Attention, forward, on tensor cores: result and log_sum of attention.cuh for 16-bit elements.
//
// A block owns ROWS queries of one head and streams the keys and values by, COLUMNS at a time. A
// warp owns whole rows of scores, so that the softmax needs no more than the four threads of a row:
// for each tile, with m about the greatest score of the row and s the sum of exp(score - m),
//   m' = max(m, tile);  s' = s exp(m - m') + sum exp(tile - m');  sums' = sums exp(m - m') + P v
// (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao,
// "FlashAttention-2", 2023), and the division by s comes last. No score leaves the registers.
//
// Two stages of shared memory: while one tile is multiplied the next one is copied, so a pass of
// the loop has one barrier. Tiles that reach over an end or the diagonal alone are masked element
// by element. `scale` must be above 0: the greatest product then has the greatest score.
//
// Defined in front: what attention.cuh lists, and WARPS, M_TILES, COLUMNS, BLOCKS (blocks that a
// multiprocessor should hold), KEEP_Q (1: queries stay in registers). Operands: q (B, H, L, E),
// k (B, G, S, E), v (B, G, S, Ev), [mask], result (B, H, L, Ev), log_sum (B, H, L) contiguous,
// [seed, offset], [q_starts, k_starts, error]; strides in elements, innermost 1. If PACKED, B is 1
// and the blocks of a sequence that it does not fill return at once.
#include "flash_dropout.cuh"

constexpr int THREADS = WARPS * 32;
constexpr int ROWS = WARPS * M_TILES * 16;
constexpr int N_TILES = COLUMNS / 8;
constexpr int STEPS = steps_of_16(HEAD);
constexpr int V_TILES = 2 * steps_of_16(HEAD_V);
constexpr int Q_BYTES = tile_bytes(ROWS, HEAD);
constexpr int K_BYTES = tile_bytes(COLUMNS, HEAD);
constexpr int STAGE_BYTES = K_BYTES + tile_bytes(COLUMNS, HEAD_V);
constexpr float SLACK = 8.0f;  // probabilities stay below 2^8
constexpr bool ADDED = MASK == ELEMENT_MASK || MASK == FLOAT32_MASK || MASK == SLOPES;

// What a thread keeps of its rows lane / 4 + 8 i of each of its tiles.
struct RowState {
  float peak[M_TILES][2];  // about the greatest score so far, in units of 1 / factor
  float sum[M_TILES][2];   // of this thread's columns
};

// What a row's scores are taken relative to; 0 as long as all of them are -inf.
__device__ __forceinline__ float finite_base(float peak, float factor) {
  return peak == MINUS_INFINITY ? 0.0f : peak * factor;
}

// Turns products into scores: masked, in units of 1 / factor with factor = ADDED ? 1 : scale.
__device__ __forceinline__ void mask_tile(
    float (&tile)[M_TILES][N_TILES][4], const Scores& scores, int row, int column) {
  const int lane = (int)(threadIdx.x % 32);
#pragma unroll
  for (int m = 0; m < M_TILES; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int y = row + 16 * m + lane / 4 + 8 * half, x = column + 2 * (lane % 4);
      const int seen = !MASK || y < scores.rows ? scores.seen(y, x) : 0;
      const int hidden = scores.hidden(y, x);
#pragma unroll
      for (int n = 0; n < N_TILES; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& value = tile[m][n][2 * half + i];
          if (8 * n + i >= seen || (LEFT && 8 * n + i < hidden)) {
            value = MINUS_INFINITY;
          } else if (ADDED) {
            value = value * scores.scale + scores.masked_value(y, x + 8 * n + i) * LOG2_E;
          } else if (MASK == BOOL_MASK) {
            value += scores.masked_value(y, x + 8 * n + i);
          }
        }
    }
}

// Scores become exp(score - peak), and sums and state follow where the peak moves. It moves where a
// score is above it by more than SLACK: any peak that keeps the powers of 2 in range gives the same
// result, so most tiles leave the sums alone.
__device__ __forceinline__ void exponentiate(
    float (&tile)[M_TILES][N_TILES][4], float (&sums)[M_TILES][V_TILES][4], RowState& state,
    float factor) {
  float peak[M_TILES][2];
  bool moves = false;
#pragma unroll
  for (int m = 0; m < M_TILES; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float found = fmaxf(tile[m][0][2 * half], tile[m][0][2 * half + 1]);
#pragma unroll
      for (int n = 1; n < N_TILES; ++n)
        found = fmaxf(found, fmaxf(tile[m][n][2 * half], tile[m][n][2 * half + 1]));
      found = fmaxf(found, __shfl_xor_sync(0xffffffffu, found, 1));
      found = fmaxf(found, __shfl_xor_sync(0xffffffffu, found, 2));
      const bool above = (found - state.peak[m][half]) * factor > SLACK;  // false for -inf - -inf
      peak[m][half] = above ? found : state.peak[m][half];
      moves = moves || above;
    }
  float fade[M_TILES][2];
#pragma unroll
  for (int m = 0; m < M_TILES; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float base = finite_base(peak[m][half], factor);
      fade[m][half] = power_of_2(state.peak[m][half] * factor - base);
      state.sum[m][half] *= fade[m][half];
      state.peak[m][half] = peak[m][half];
    }
  if (__any_sync(0xffffffffu, moves)) {
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
      for (int n = 0; n < V_TILES; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[m][n][i] *= fade[m][i / 2];
  }
#pragma unroll
  for (int m = 0; m < M_TILES; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float base = finite_base(state.peak[m][half], factor);
#pragma unroll
      for (int n = 0; n < N_TILES; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          tile[m][n][i] = power_of_2(tile[m][n][i] * factor - base);
          state.sum[m][half] += tile[m][n][i];
        }
    }
}

// Zeroes what is dropped.
__device__ __forceinline__ void drop_tile(
    float (&tile)[M_TILES][N_TILES][4], const Dropout& dropout, int row, int column) {
  KeepBits<M_TILES, N_TILES> bits;
  bits.draw_by_rows(dropout, row, column);
#pragma unroll
  for (int m = 0; m < M_TILES; ++m)
#pragma unroll
    for (int n = 0; n < N_TILES; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (!bits.keeps(m, n, i)) tile[m][n][i] = 0.0f;
}

// The tile's products with the keys, with queries from registers or shared memory.
__device__ __forceinline__ void multiply_queries(
    float (&tile)[M_TILES][N_TILES][4], const u32 (&kept)[KEEP_Q ? STEPS : 1][M_TILES][4],
    SharedAddress q, int row, SharedAddress k) {
  if constexpr (KEEP_Q) {
    const SharedAddress start = start_of_rows<HEAD>(k);
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
#pragma unroll
      for (int n = 0; n < N_TILES / 2; ++n) {
        u32 b[4];
        load_matrices(b, moved<HEAD>(start, 16 * n, step));
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) {
          multiply_step(tile[m][2 * n], kept[step][m], b[0], b[1], step);
          multiply_step(tile[m][2 * n + 1], kept[step][m], b[2], b[3], step);
        }
      }
  } else {
    multiply_rows<HEAD>(tile, q, row, k);
  }
}

// Divides by the sums and writes the rows of a warp.
__device__ __forceinline__ void finish_rows(
    const float (&sums)[M_TILES][V_TILES][4], const RowState& state, float factor, float gain,
    u16* result, i64 step, float* log_sum, int row, int end) {
  const int lane = (int)(threadIdx.x % 32);
#pragma unroll
  for (int m = 0; m < M_TILES; ++m) {
    float factors[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = state.sum[m][half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const bool none = sum == 0.0f;
      factors[half] = none ? 0.0f : gain / sum;
      const int place = row + 16 * m + lane / 4 + 8 * half;
      if (lane % 4 == 0 && place < end)
        log_sum[place] = none ? 0.0f : state.peak[m][half] * factor * LOG_2 + logf(sum);
    }
    store_rows<HEAD_V>(result, step, row + 16 * m, end, sums[m], factors[0], factors[1]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) flash_attention_forward(
    const u16* q, const u16* k, const u16* v,
#if MASK
    const MaskElement* mask,
#endif
    u16* result, float* log_sum,
#if DROPOUT
    const i64* seed, const i64* offset,
#endif
#if PACKED
    const int* q_starts, const int* k_starts, i64* error,
#endif
    i64 heads, i64 key_heads, i64 length, i64 key_length, i64 scale_bits, i64 q_batch, i64 q_head,
    i64 q_row, i64 k_batch, i64 k_head, i64 k_row, i64 v_batch, i64 v_head, i64 v_row,
    i64 result_batch, i64 result_head, i64 result_row
#if MASK
    , i64 mask_batch, i64 mask_head, i64 mask_row, i64 mask_column
#endif
#if DROPOUT
    , i64 threshold, i64 gain_bits
#endif
#if PACKED
    , i64 sequences, i64 max_q, i64 max_k, i64 left, i64 right
#endif
) {
  DYNAMIC_SHARED(memory);
  const int tiles = (int)((MOST_ROWS + ROWS - 1) / ROWS);
  const int number = (int)(blockIdx.x / tiles);
  const int first = (tiles - 1 - (int)(blockIdx.x % tiles)) * ROWS;  // the longest first, if causal
  const i64 batch = number / heads, head = number % heads, key_head = head / (heads / key_heads);
  const Span span = SPAN(batch);
  if (PACKED && first >= span.rows) return;
  const int warp = (int)(threadIdx.x / 32), own_row = warp * M_TILES * 16, end = span.rows;
  const Rows q_rows =
      rows_of(q + batch * q_batch + head * q_head + span.first_row * q_row, q_row);
  const Rows k_rows =
      rows_of(k + batch * k_batch + key_head * k_head + span.first_column * k_row, k_row);
  const Rows v_rows =
      rows_of(v + batch * v_batch + key_head * v_head + span.first_column * v_row, v_row);

  const float scale = (float)number_of(scale_bits) * LOG2_E, factor = ADDED ? 1.0f : scale;
  Scores scores = scores_of(span, scale);
#if MASK
  scores.read_mask(mask + batch * mask_batch + head * mask_head, mask_row, mask_column);
#endif
  float gain = 1.0f;
#if DROPOUT
  const Dropout dropout = dropout_of(
      seed, offset, number, length, key_length, threshold, gain_bits);
  gain = dropout.gain;
#endif

  const int begin = scores.columns_begin(first, COLUMNS), last = scores.columns_end(first, ROWS);
  const int passes = begin < last ? (last - begin + COLUMNS - 1) / COLUMNS : 0;
  clear_padding<ROWS, HEAD, THREADS>(memory);
  for (int stage = 0; stage < 2; ++stage) {
    clear_padding<COLUMNS, HEAD, THREADS>(memory + Q_BYTES + stage * STAGE_BYTES);
    clear_padding<COLUMNS, HEAD_V, THREADS>(memory + Q_BYTES + stage * STAGE_BYTES + K_BYTES);
  }
  load_tile<ROWS, HEAD, THREADS>(memory, q_rows, first, end);
  if (passes) {
    load_tile<COLUMNS, HEAD, THREADS>(memory + Q_BYTES, k_rows, begin, scores.columns);
    load_tile<COLUMNS, HEAD_V, THREADS>(memory + Q_BYTES + K_BYTES, v_rows, begin, scores.columns);
  }
  copy_commit();

  float sums[M_TILES][V_TILES][4];
  RowState state;
  u32 kept[KEEP_Q ? STEPS : 1][M_TILES][4];
  clear(sums);
#pragma unroll
  for (int m = 0; m < M_TILES; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      state.peak[m][half] = MINUS_INFINITY;
      state.sum[m][half] = 0.0f;
    }

  if constexpr (KEEP_Q) {
    copy_wait<0>();
    __syncthreads();
    const SharedAddress start = start_of_a<HEAD>(shared_address(memory), own_row);
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
#pragma unroll
      for (int m = 0; m < M_TILES; ++m)
        load_matrices(kept[step][m], moved<HEAD>(start, 16 * m, step));
  }

#pragma unroll 1
  for (int pass = 0; pass < passes; ++pass) {
    const int column = begin + pass * COLUMNS;
    unsigned char* stage = memory + Q_BYTES + pass % 2 * STAGE_BYTES;
    copy_wait<0>();
    __syncthreads();  // this tile is there, and all are done with the other stage
    if (pass + 1 < passes) {
      unsigned char* next = memory + Q_BYTES + (pass + 1) % 2 * STAGE_BYTES;
      load_tile<COLUMNS, HEAD, THREADS>(next, k_rows, column + COLUMNS, scores.columns);
      load_tile<COLUMNS, HEAD_V, THREADS>(next + K_BYTES, v_rows, column + COLUMNS, scores.columns);
      copy_commit();
    }
    float tile[M_TILES][N_TILES][4];
    multiply_queries(tile, kept, shared_address(memory), own_row, shared_address(stage));
    if (MASK || scores.ragged(first + own_row, 16 * M_TILES, column, COLUMNS))
      mask_tile(tile, scores, first + own_row, column);
    exponentiate(tile, sums, state, factor);
#if DROPOUT
    drop_tile(tile, dropout, first + own_row, column);
#endif
    multiply_columns<HEAD_V>(sums, tile, shared_address(stage + K_BYTES));
  }
  finish_rows(
      sums, state, factor, gain,
      result + batch * result_batch + head * result_head + span.first_row * result_row, result_row,
      log_sum + (ENTRY(batch) * heads + head) * length + span.first_row, first + own_row, end);
}
