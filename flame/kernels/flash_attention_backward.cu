// Attention, backward, on tensor cores, for 16-bit elements: with P, Z of attention.cuh and
//   delta(i) = grad_i . result_i - shift(i)                       (attention_delta.cu)
//   dS(i, j) = P(i, j) (Z(i, j) grad_i . v_j - delta(i))
//   dq_i = scale sum_j dS(i, j) k_j,  dk_j = scale sum_i dS(i, j) q_i,
//   dv_j = sum_i P(i, j) Z(i, j) grad_i
// P is computed again from log_sum (Dao, "FlashAttention-2", 2023). One text makes two kernels. A
// block owns what it sums up, so the result does not depend on the order in which blocks run:
//   KEYS 1: a block owns ROWS keys and streams queries by; gives dk and dv.
//   KEYS 0: a block owns ROWS queries and streams keys by; gives dq.
// The tile that stays is the pair (own, own_v), the one that streams by (stream, stream_v):
// k, v and q, grad, or the other way round. With rows of the owner,
//   P = exp(scale own stream^T - log_sum),  dS = P (Z own_v stream_v^T - delta),
//   first += dS stream,  second += P Z stream_v (KEYS only).
// Weights go from accumulators to operands in registers. If KEYS, the heads that share a gradient
// are summed by their block in order.
//
// Stages and barriers as in flash_attention_forward.cu. Queries behind the end are zeros with
// log_sum and delta 0, which add nothing; keys behind the end are masked.
//
// Defined in front: what attention.cuh lists; KEYS, FIRST and SECOND (1: compute dq or dk; dv),
// WARPS, M_TILES, COLUMNS, BLOCKS. Operands: grad (B, H, L, Ev), q, k, v, [mask], log_sum and delta
// (B, H, L) contiguous, dq or dk and dv, [seed, offset], [q_starts, k_starts, error]; strides in
// elements, innermost 1. dk and dv have as many heads as the keys or as the queries. PACKED as in
// flash_attention_forward.cu.
#include "flash_dropout.cuh"

constexpr int THREADS = WARPS * 32;
constexpr int ROWS = WARPS * M_TILES * 16;
constexpr int N_TILES = COLUMNS / 8;
constexpr int E_TILES = 2 * steps_of_16(HEAD);
constexpr int V_TILES = 2 * steps_of_16(HEAD_V);
constexpr int OWN_BYTES = tile_bytes(ROWS, HEAD);
constexpr int OWN_V_BYTES = FIRST ? tile_bytes(ROWS, HEAD_V) : 0;
constexpr int STREAM_BYTES = tile_bytes(COLUMNS, HEAD);
constexpr int STREAM_V_BYTES = tile_bytes(COLUMNS, HEAD_V);
constexpr int QUERY_BYTES = KEYS ? 2 * COLUMNS * 4 : 0;  // log_sum and delta of the columns
constexpr int DRAWN_BYTES = KEYS && DROPOUT ? ROWS / 16 * COLUMNS * 2 : 0;
constexpr int STAGE_BYTES = STREAM_BYTES + STREAM_V_BYTES + QUERY_BYTES + DRAWN_BYTES;
constexpr bool ADDED = MASK == ELEMENT_MASK || MASK == FLOAT32_MASK || MASK == SLOPES;

// log_sum and delta of the queries: of a thread's own rows, or of the columns in shared memory.
struct Queries {
  float log_sum[M_TILES][2], delta[M_TILES][2];
  const float* staged;

  __device__ __forceinline__ float log_sum_of(int m, int n, int i) const {
    return KEYS ? staged[8 * n + 2 * (threadIdx.x % 4) + i % 2] : log_sum[m][i / 2];
  }
  __device__ __forceinline__ float delta_of(int m, int n, int i) const {
    return KEYS ? staged[COLUMNS + 8 * n + 2 * (threadIdx.x % 4) + i % 2] : delta[m][i / 2];
  }
};

// Products become probabilities; 0 where masked.
__device__ __forceinline__ void probabilities(
    float (&tile)[M_TILES][N_TILES][4], const Scores& scores, const Queries& queries, int row,
    int column) {
  const int lane = (int)(threadIdx.x % 32);
  const bool ragged = KEYS ? scores.hides(column, COLUMNS, row, 16 * M_TILES)
                           : scores.ragged(row, 16 * M_TILES, column, COLUMNS);
#pragma unroll
  for (int m = 0; m < M_TILES; ++m)
#pragma unroll
    for (int n = 0; n < N_TILES; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float base = queries.log_sum_of(m, n, i) * -LOG2_E;
        if (MASK || ragged) {
          const int y = row + 16 * m + lane / 4 + 8 * (i / 2);
          const int x = column + 8 * n + 2 * (lane % 4) + i % 2;
          const int query = KEYS ? x : y, key = KEYS ? y : x;
          if (!scores.inside(query, key)) {
            base = MINUS_INFINITY;
            tile[m][n][i] = 0.0f;
          } else if (MASK) {
            base += scores.masked_value(query, key) * (ADDED ? LOG2_E : 1.0f);
          }
        }
        tile[m][n][i] = power_of_2(tile[m][n][i] * scores.scale + base);
      }
}

// slopes hold own_v stream_v^T and become dS.
__device__ __forceinline__ void slopes_of(
    float (&slopes)[M_TILES][N_TILES][4], const float (&tile)[M_TILES][N_TILES][4],
    const Queries& queries) {
#pragma unroll
  for (int m = 0; m < M_TILES; ++m)
#pragma unroll
    for (int n = 0; n < N_TILES; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        slopes[m][n][i] = tile[m][n][i] * (slopes[m][n][i] - queries.delta_of(m, n, i));
}

// factor where kept, 0 where dropped, times the tile.
__device__ __forceinline__ void drop(
    float (&tile)[M_TILES][N_TILES][4], const KeepBits<M_TILES, N_TILES>& bits, float factor) {
#pragma unroll
  for (int m = 0; m < M_TILES; ++m)
#pragma unroll
    for (int n = 0; n < N_TILES; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        tile[m][n][i] = bits.keeps(m, n, i) ? tile[m][n][i] * factor : 0.0f;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) flash_attention_backward(
    const u16* grad, const u16* q, const u16* k, const u16* v,
#if MASK
    const MaskElement* mask,
#endif
    const float* log_sum, const float* delta,
#if KEYS
    u16* dk, u16* dv,
#else
    u16* dq,
#endif
#if DROPOUT
    const i64* seed, const i64* offset,
#endif
#if PACKED
    const int* q_starts, const int* k_starts, i64* error,
#endif
    i64 heads, i64 key_heads, i64 gradient_heads, i64 length, i64 key_length, i64 scale_bits,
    i64 grad_batch, i64 grad_head, i64 grad_row, i64 q_batch, i64 q_head, i64 q_row, i64 k_batch,
    i64 k_head, i64 k_row, i64 v_batch, i64 v_head, i64 v_row,
#if KEYS
    i64 dk_batch, i64 dk_head, i64 dk_row, i64 dv_batch, i64 dv_head, i64 dv_row
#else
    i64 dq_batch, i64 dq_head, i64 dq_row
#endif
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
  unsigned char* own_v = memory + OWN_BYTES;
  unsigned char* stages = own_v + OWN_V_BYTES;
  const int tiles = (int)(((KEYS ? MOST_COLUMNS : MOST_ROWS) + ROWS - 1) / ROWS);
  const int number = (int)(blockIdx.x / tiles), place = (int)(blockIdx.x % tiles);
  // Causal: the longest first, which are the last queries, or the first keys.
  const int first = (CAUSAL && !KEYS ? tiles - 1 - place : place) * ROWS;
  const i64 owners = KEYS ? gradient_heads : heads;
  const i64 batch = number / owners, owner = number % owners;
  const int group = (int)(heads / owners);  // query heads that this block sums over
  const i64 first_head = owner * group, key_head = first_head / (heads / key_heads);
  const Span span = SPAN(batch);
  const int own_end = KEYS ? span.columns : span.rows;
  const int stream_end = KEYS ? span.rows : span.columns;
  if (PACKED && first >= own_end) return;
  const int own_row = (int)(threadIdx.x / 32) * M_TILES * 16, lane = (int)(threadIdx.x % 32);

  const Rows k_rows =
      rows_of(k + batch * k_batch + key_head * k_head + span.first_column * k_row, k_row);
  const Rows v_rows =
      rows_of(v + batch * v_batch + key_head * v_head + span.first_column * v_row, v_row);
  Rows q_rows =
      rows_of(q + batch * q_batch + first_head * q_head + span.first_row * q_row, q_row);
  Rows grad_rows = rows_of(
      grad + batch * grad_batch + first_head * grad_head + span.first_row * grad_row, grad_row);
  q_rows.aligned = q_rows.aligned && fits_16_bytes(nullptr, q_head);
  grad_rows.aligned = grad_rows.aligned && fits_16_bytes(nullptr, grad_head);
  log_sum += (ENTRY(batch) * heads + first_head) * length + span.first_row;
  delta += (ENTRY(batch) * heads + first_head) * length + span.first_row;

  Scores scores = scores_of(span, (float)number_of(scale_bits) * LOG2_E);
#if DROPOUT
  const Dropout dropout = dropout_of(seed, offset, batch * heads + first_head, length, key_length,
                               threshold, gain_bits);
#endif

  // What is streamed, for each head of the group.
  const int begin =
      KEYS ? span.rows_begin(first, COLUMNS) : span.columns_begin(first, COLUMNS);
  const int last = KEYS ? span.rows_end(first, ROWS) : span.columns_end(first, ROWS);

  // Starts to copy one pass's tiles, and draws what it drops.
  auto load_stage = [&](unsigned char* stage, int member, int column) {
    Rows rows = KEYS ? q_rows : k_rows, v_part = KEYS ? grad_rows : v_rows;
    if (KEYS) {
      rows.base += member * q_head;
      v_part.base += member * grad_head;
    }
    load_tile<COLUMNS, HEAD, THREADS>(stage, rows, column, stream_end);
    load_tile<COLUMNS, HEAD_V, THREADS>(stage + STREAM_BYTES, v_part, column, stream_end);
    if (KEYS) {
      for (int i = thread_anew(); i < 2 * COLUMNS; i += THREADS) {
        const int place = column + i % COLUMNS;
        const float* source = (i < COLUMNS ? log_sum : delta) + member * length;
        const bool valid = place < stream_end;
        copy_4(shared_address(stage + STREAM_BYTES + STREAM_V_BYTES + 4 * i),
               source + (valid ? place : 0), valid);
      }
#if DROPOUT
      Dropout own = dropout;
      own.first += (u64)member * length * dropout.pitch;
      draw_by_columns<ROWS, COLUMNS, THREADS>(
          (u16*)(stage + STAGE_BYTES - DRAWN_BYTES), own, first, column);
#endif
    }
    copy_commit();
  };

  clear_padding<ROWS, HEAD, THREADS>(memory);
  if (FIRST) clear_padding<ROWS, HEAD_V, THREADS>(own_v);
  for (int stage = 0; stage < 2; ++stage) {
    clear_padding<COLUMNS, HEAD, THREADS>(stages + stage * STAGE_BYTES);
    clear_padding<COLUMNS, HEAD_V, THREADS>(stages + stage * STAGE_BYTES + STREAM_BYTES);
  }
  load_tile<ROWS, HEAD, THREADS>(memory, KEYS ? k_rows : q_rows, first, own_end);
  if (FIRST) load_tile<ROWS, HEAD_V, THREADS>(own_v, KEYS ? v_rows : grad_rows, first, own_end);
  if (begin < last) load_stage(stages, 0, begin);

  Queries queries;
  if (!KEYS) {
#pragma unroll
    for (int m = 0; m < M_TILES; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int place = first + own_row + 16 * m + lane / 4 + 8 * half;
        queries.log_sum[m][half] = place < own_end ? log_sum[place] : 0.0f;
        queries.delta[m][half] = place < own_end ? delta[place] : 0.0f;
      }
  }
  float first_sums[M_TILES][E_TILES][4];
  float second_sums[M_TILES][V_TILES][4];
  clear(first_sums);
  clear(second_sums);

#pragma unroll 1
  for (int member = 0, column = begin, turn = 0; begin < last && member < group; turn ^= 1) {
    unsigned char* stage = stages + turn * STAGE_BYTES;
    const bool head_ends = column + COLUMNS >= last;
    const int next_member = member + head_ends, next = head_ends ? begin : column + COLUMNS;
    const SharedAddress stream = shared_address(stage);
    const SharedAddress stream_v = shared_address(stage + STREAM_BYTES);
    copy_wait<0>();
    __syncthreads();  // this pass's tiles are there, and all are done with the other stage
    if (next_member < group)
      load_stage(stages + (turn ^ 1) * STAGE_BYTES, next_member, next);
    queries.staged = (const float*)(stage + STREAM_BYTES + STREAM_V_BYTES);
#if MASK
    scores.read_mask(
        mask + batch * mask_batch + (first_head + member) * mask_head, mask_row, mask_column);
#endif

    float tile[M_TILES][N_TILES][4];
    multiply_rows<HEAD>(tile, shared_address(memory), own_row, stream);
    probabilities(tile, scores, queries, first + own_row, column);
#if DROPOUT
    KeepBits<M_TILES, N_TILES> bits;
    if (KEYS) {
      bits.read_columns<ROWS>((const u16*)(stage + STAGE_BYTES - DRAWN_BYTES), own_row);
    } else {
      bits.draw_by_rows(dropout, first + own_row, column);
    }
#endif
    if (SECOND) {
#if DROPOUT
      float kept[M_TILES][N_TILES][4];
      for (int m = 0; m < M_TILES; ++m)
        for (int n = 0; n < N_TILES; ++n)
          for (int i = 0; i < 4; ++i) kept[m][n][i] = tile[m][n][i];
      drop(kept, bits, 1.0f);
      multiply_columns<HEAD_V>(second_sums, kept, stream_v);
#else
      multiply_columns<HEAD_V>(second_sums, tile, stream_v);
#endif
    }
    if (FIRST) {
      float slopes[M_TILES][N_TILES][4];
      multiply_rows<HEAD_V>(slopes, shared_address(own_v), own_row, stream_v);
#if DROPOUT
      drop(slopes, bits, dropout.gain);
#endif
      slopes_of(slopes, tile, queries);
      multiply_columns<HEAD>(first_sums, slopes, stream);
    }
    member = next_member;
    column = next;
  }

  float scale = (float)number_of(scale_bits), gain = 1.0f;
#if DROPOUT
  gain = dropout.gain;
#endif
#if KEYS
  u16* first_target = dk + batch * dk_batch + owner * dk_head + span.first_column * dk_row;
  u16* second_target = dv + batch * dv_batch + owner * dv_head + span.first_column * dv_row;
  const i64 first_step = dk_row, second_step = dv_row;
#else
  u16* first_target = dq + batch * dq_batch + owner * dq_head + span.first_row * dq_row;
  u16* second_target = nullptr;
  const i64 first_step = dq_row, second_step = 0;
#endif
#pragma unroll
  for (int m = 0; m < M_TILES; ++m) {
    const int row = first + own_row + 16 * m;
    if (FIRST)
      store_rows<HEAD>(first_target, first_step, row, own_end, first_sums[m], scale, scale);
    if (SECOND)
      store_rows<HEAD_V>(second_target, second_step, row, own_end, second_sums[m], gain, gain);
  }
}
