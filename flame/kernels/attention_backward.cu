// Attention, backward, in plain multiplications and additions; see attention_forward.cu for what it
// serves and flash_attention_backward.cu for the mathematics. KEYS 1 gives dk and dv, KEYS 0 dq.
//
// Defined in front: what attention.cuh lists; KEYS; M_TILES, N_TILES of plain_tiles.cuh. Operands
// as in flash_attention_backward.cu, with four strides each; log_sum and delta are Wide.
#include "plain_tiles.cuh"

extern "C" __global__ void __launch_bounds__(THREADS) attention_backward(
    const Element* grad, const Element* q, const Element* k, const Element* v,
#if MASK
    const MaskElement* mask,
#endif
    const Wide* log_sum, const Wide* delta,
#if KEYS
    Element* dk, Element* dv,
#else
    Element* dq,
#endif
#if DROPOUT
    const i64* seed, const i64* offset,
#endif
#if PACKED
    const int* q_starts, const int* k_starts, i64* error,
#endif
    i64 heads, i64 key_heads, i64 gradient_heads, i64 length, i64 key_length, i64 scale_bits,
    i64 grad_batch, i64 grad_head, i64 grad_row, i64 grad_column, i64 q_batch, i64 q_head,
    i64 q_row, i64 q_column, i64 k_batch, i64 k_head, i64 k_row, i64 k_column, i64 v_batch,
    i64 v_head, i64 v_row, i64 v_column,
#if KEYS
    i64 dk_batch, i64 dk_head, i64 dk_row, i64 dk_column, i64 dv_batch, i64 dv_head, i64 dv_row,
    i64 dv_column
#else
    i64 dq_batch, i64 dq_head, i64 dq_row, i64 dq_column
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
  Wide* own = (Wide*)memory;                        // (ROWS, HEAD)
  Wide* own_v = own + ROWS * (HEAD + 1);            // (ROWS, HEAD_V)
  Wide* stream = own_v + ROWS * (HEAD_V + 1);       // (COLUMNS, HEAD)
  Wide* stream_v = stream + COLUMNS * (HEAD + 1);   // (COLUMNS, HEAD_V)
  Wide* weights = stream_v + COLUMNS * (HEAD_V + 1);  // (ROWS, COLUMNS)
  const int tiles = (int)(((KEYS ? MOST_COLUMNS : MOST_ROWS) + ROWS - 1) / ROWS);
  const int number = (int)(blockIdx.x / tiles), first = (int)(blockIdx.x % tiles) * ROWS;
  const i64 owners = KEYS ? gradient_heads : heads;
  const i64 batch = number / owners, owner = number % owners;
  const int group = (int)(heads / owners);  // query heads that this block sums over
  const i64 key_head = owner * group / (heads / key_heads);
  const Span span = SPAN(batch);
  const int own_end = KEYS ? span.columns : span.rows;
  const int stream_end = KEYS ? span.rows : span.columns;
  if (PACKED && first >= own_end) return;
  const Matrix keys{
      k + batch * k_batch + key_head * k_head + span.first_column * k_row, k_row, k_column};
  const Matrix values{
      v + batch * v_batch + key_head * v_head + span.first_column * v_row, v_row, v_column};
  const Wide scale = (Wide)number_of(scale_bits);
  Scores scores = scores_of(span, scale);
  Wide gain = 1;

  Wide first_sums[M_TILES][E_TILES], second_sums[M_TILES][V_TILES];
  clear(first_sums);
  clear(second_sums);
  const int begin =
      KEYS ? span.rows_begin(first, COLUMNS) : span.columns_begin(first, COLUMNS);
  const int last = KEYS ? span.rows_end(first, ROWS) : span.columns_end(first, ROWS);
  for (int member = 0; member < group; ++member) {
    const i64 head = owner * group + member;
    const i64 row_base = (ENTRY(batch) * heads + head) * length + span.first_row;
    const Matrix queries{
        q + batch * q_batch + head * q_head + span.first_row * q_row, q_row, q_column};
    const Matrix grads{
        grad + batch * grad_batch + head * grad_head + span.first_row * grad_row, grad_row,
        grad_column};
#if MASK
    scores.read_mask(mask + batch * mask_batch + head * mask_head, mask_row, mask_column);
#endif
#if DROPOUT
    const Dropout dropout = dropout_of(seed, offset, batch * heads + head, length, key_length,
                                       threshold, gain_bits);
    gain = dropout.gain;
#endif
    if (member == 0) {
      load_tile<ROWS, HEAD>(own, KEYS ? keys : queries, first, own_end);
      load_tile<ROWS, HEAD_V>(own_v, KEYS ? values : grads, first, own_end);
    }
    for (int column = begin; column < last; column += COLUMNS) {
      __syncthreads();
      load_tile<COLUMNS, HEAD>(stream, KEYS ? queries : keys, column, stream_end);
      load_tile<COLUMNS, HEAD_V>(stream_v, KEYS ? grads : values, column, stream_end);
      __syncthreads();
      Wide tile[M_TILES][N_TILES], slopes[M_TILES][N_TILES];
      multiply_rows<HEAD>(tile, own, stream);
      multiply_rows<HEAD_V>(slopes, own_v, stream_v);
#pragma unroll
      for (int i = 0; i < M_TILES; ++i)
#pragma unroll
        for (int j = 0; j < N_TILES; ++j) {
          const int y = first + thread_y() + 16 * i, x = column + thread_x() + 16 * j;
          const int query = KEYS ? x : y, key = KEYS ? y : x;
          Wide found = 0, slope = 0;
          if (scores.inside(query, key)) {
            const Wide score = score_of(scores, tile[i][j], query, key);
            found = exponential(score - log_sum[row_base + query]);
            Wide factor = 1;
#if DROPOUT
            factor = dropout.keeps(query, key) ? gain : (Wide)0;
#endif
            slope = found * (factor * slopes[i][j] - delta[row_base + query]);
            found *= factor;
          }
          tile[i][j] = found;
          slopes[i][j] = slope;
        }
      if (KEYS) {
        share_weights(weights, tile);
        __syncthreads();
        multiply_columns<HEAD_V>(second_sums, weights, stream_v);
        __syncthreads();
      }
      share_weights(weights, slopes);
      __syncthreads();
      multiply_columns<HEAD>(first_sums, weights, stream);
    }
  }
#pragma unroll
  for (int i = 0; i < M_TILES; ++i) {
    const int place = first + thread_y() + 16 * i;
    if (place >= own_end) continue;
#if KEYS
    const i64 row = span.first_column + place;
    store_row<HEAD>(dk + batch * dk_batch + owner * dk_head + row * dk_row, dk_column,
                    first_sums[i], scale);
    store_row<HEAD_V>(dv + batch * dv_batch + owner * dv_head + row * dv_row, dv_column,
                      second_sums[i], (Wide)1);
#else
    const i64 row = span.first_row + place;
    store_row<HEAD>(dq + batch * dq_batch + owner * dq_head + row * dq_row, dq_column,
                    first_sums[i], scale);
#endif
  }
}
