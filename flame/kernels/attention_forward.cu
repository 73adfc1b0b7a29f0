// Attention, forward, in plain multiplications and additions: float32 and float64 tensors, and
// 16-bit ones that flash_attention_forward.cu does not take (strides, widths, scales).
//
// The same recurrence: a block owns ROWS queries of one head and streams keys and values by. Keys
// and values of a tile follow each other in one place of shared memory.
//
// Defined in front: what attention.cuh lists, and M_TILES, N_TILES of plain_tiles.cuh. Operands as
// in flash_attention_forward.cu, with four strides each; log_sum is Wide.
#include "plain_tiles.cuh"

constexpr int WIDEST = HEAD > HEAD_V ? HEAD : HEAD_V;

extern "C" __global__ void __launch_bounds__(THREADS) attention_forward(
    const Element* q, const Element* k, const Element* v,
#if MASK
    const MaskElement* mask,
#endif
    Element* result, Wide* log_sum,
#if DROPOUT
    const i64* seed, const i64* offset,
#endif
#if PACKED
    const int* q_starts, const int* k_starts, i64* error,
#endif
    i64 heads, i64 key_heads, i64 length, i64 key_length, i64 scale_bits, i64 q_batch, i64 q_head,
    i64 q_row, i64 q_column, i64 k_batch, i64 k_head, i64 k_row, i64 k_column, i64 v_batch,
    i64 v_head, i64 v_row, i64 v_column, i64 result_batch, i64 result_head, i64 result_row,
    i64 result_column
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
  Wide* own = (Wide*)memory;                 // (ROWS, HEAD)
  Wide* stream = own + ROWS * (HEAD + 1);    // (COLUMNS, HEAD), then (COLUMNS, HEAD_V)
  Wide* weights = stream + COLUMNS * (WIDEST + 1);
  const int tiles = (int)((MOST_ROWS + ROWS - 1) / ROWS);
  const int number = (int)(blockIdx.x / tiles), first = (int)(blockIdx.x % tiles) * ROWS;
  const i64 batch = number / heads, head = number % heads, key_head = head / (heads / key_heads);
  const Span span = SPAN(batch);
  if (PACKED && first >= span.rows) return;
  const Matrix queries{
      q + batch * q_batch + head * q_head + span.first_row * q_row, q_row, q_column};
  const Matrix keys{
      k + batch * k_batch + key_head * k_head + span.first_column * k_row, k_row, k_column};
  const Matrix values{
      v + batch * v_batch + key_head * v_head + span.first_column * v_row, v_row, v_column};
  Scores scores = scores_of(span, (Wide)number_of(scale_bits));
#if MASK
  scores.read_mask(mask + batch * mask_batch + head * mask_head, mask_row, mask_column);
#endif
  Wide gain = 1;
#if DROPOUT
  const Dropout dropout =
      dropout_of(seed, offset, number, length, key_length, threshold, gain_bits);
  gain = dropout.gain;
#endif

  load_tile<ROWS, HEAD>(own, queries, first, scores.rows);
  Wide sums[M_TILES][V_TILES], peak[M_TILES], total[M_TILES];
  clear(sums);
#pragma unroll
  for (int i = 0; i < M_TILES; ++i) {
    peak[i] = (Wide)MINUS_INFINITY;
    total[i] = 0;
  }
  const int begin = scores.columns_begin(first, COLUMNS), last = scores.columns_end(first, ROWS);
  for (int column = begin; column < last; column += COLUMNS) {
    __syncthreads();
    load_tile<COLUMNS, HEAD>(stream, keys, column, scores.columns);
    __syncthreads();
    Wide tile[M_TILES][N_TILES];
    multiply_rows<HEAD>(tile, own, stream);
#pragma unroll
    for (int i = 0; i < M_TILES; ++i) {
      const int row = first + thread_y() + 16 * i;
      Wide most = peak[i];
#pragma unroll
      for (int j = 0; j < N_TILES; ++j) {
        tile[i][j] = score_of(scores, tile[i][j], row, column + thread_x() + 16 * j);
        most = tile[i][j] > most ? tile[i][j] : most;
      }
#pragma unroll
      for (int step = 8; step; step /= 2) {
        const Wide other = __shfl_xor_sync(0xffffffffu, most, step);
        most = other > most ? other : most;
      }
      const Wide base = most == (Wide)MINUS_INFINITY ? (Wide)0 : most;
      const Wide fade = exponential(peak[i] - base);
      total[i] *= fade;
      peak[i] = most;
#pragma unroll
      for (int e = 0; e < V_TILES; ++e) sums[i][e] *= fade;
#pragma unroll
      for (int j = 0; j < N_TILES; ++j) {
        tile[i][j] = exponential(tile[i][j] - base);
        total[i] += tile[i][j];
#if DROPOUT
        if (!dropout.keeps(row, column + thread_x() + 16 * j)) tile[i][j] = 0;
#endif
      }
    }
    share_weights(weights, tile);
    __syncthreads();
    load_tile<COLUMNS, HEAD_V>(stream, values, column, scores.columns);
    __syncthreads();
    multiply_columns<HEAD_V>(sums, weights, stream);
  }
#pragma unroll
  for (int i = 0; i < M_TILES; ++i) {
    const int row = first + thread_y() + 16 * i;
    Wide sum = total[i];
#pragma unroll
    for (int step = 8; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (row >= scores.rows) continue;
    const bool none = sum == 0;
    if (thread_x() == 0)
      log_sum[(ENTRY(batch) * heads + head) * length + span.first_row + row] =
          none ? (Wide)0 : peak[i] + logarithm(sum);
    store_row<HEAD_V>(
        result + batch * result_batch + head * result_head + (span.first_row + row) * result_row,
        result_column, sums[i], none ? (Wide)0 : gain / sum);
  }
}
