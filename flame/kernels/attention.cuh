// What all attention kernels share: how a product of query and key becomes a score, and which
// probabilities are dropped.
//
//   score(i, j)  = scale q_i . k_j + mask(i, j); -inf where masked, and if causal where j > i
//   P(i, j)      = exp(score(i, j) - log_sum(i)),  log_sum(i) = log sum_j exp score(i, j)
//   result(i)    = sum_j P(i, j) Z(i, j) v_j,      Z = 0 where dropped, else 1 / (1 - p)
// A row that is masked throughout gives 0, and its log_sum is 0.
//
// Defined in front of the text: ELEMENT (numbers.cuh); HEAD and HEAD_V, the widths E and Ev; CAUSAL
// and DROPOUT, 0 or 1; MASK, one of the codes below; PACKED and LEFT, 0 or 1, see `Span`.
//
// Query heads share key heads: head h reads key head h / (heads / key_heads). Masks are addressed
// by strides, 0 where they broadcast. Offsets of rows are 64-bit.
#include "philox.cuh"

#define NO_MASK 0
#define BOOL_MASK 1     // bytes, other than 0 takes part
#define ELEMENT_MASK 2  // of the operands' dtype, added
#define FLOAT32_MASK 3  // added
#define SLOPES 4        // float32, one a head: -slope |own place of the row - column| is added

#if MASK == FLOAT32_MASK || MASK == SLOPES
typedef float MaskElement;
#elif MASK == ELEMENT_MASK
typedef Element MaskElement;
#else
typedef unsigned char MaskElement;
#endif

__device__ __forceinline__ int smaller(i64 a, i64 b) { return (int)(a < b ? a : b); }
__device__ __forceinline__ int not_below_0(int a) { return a > 0 ? a : 0; }

// The queries (rows) and keys (columns) of a block: those of an entry of the batch, or, if PACKED,
// of one of the sequences that stand one behind the other in a batch of one entry.
//
// Row i of L has its own place at column i + S - L if PACKED, else at column i. CAUSAL: it sees no
// column behind its own place, or, if PACKED, none more than `right` behind. LEFT: none more than
// `left` before.
struct Span {
  int rows, columns;  // L, S
#if PACKED
  i64 first_row, first_column;  // of the sequence, in the operands
  int shift, left, right;       // shift = S - L
#else
  static constexpr i64 first_row = 0, first_column = 0;
  static constexpr int shift = 0, left = 0, right = 0;
#endif

  // How many columns a row may see, from `column` on.
  __device__ __forceinline__ int seen(int row, int column) const {
    const int behind = columns - column, own = row + 1 + shift + right - column;
    return CAUSAL && own < behind ? own : behind;
  }

  // How many of them it does not see because they stand too far before it.
  __device__ __forceinline__ int hidden(int row, int column) const {
    return LEFT ? row + shift - left - column : 0;
  }

  __device__ __forceinline__ bool inside(int row, int column) const {
    return row < rows && seen(row, column) > 0 && (!LEFT || hidden(row, column) <= 0);
  }

  // Whether a tile has columns that are not `inside` for some of its rows. Rows behind the end are
  // zeros in shared memory and do no harm.
  __device__ __forceinline__ bool ragged(int row, int height, int column, int width) const {
    return column + width > columns || hides(row, height, column, width);
  }

  // Whether some of the rows do not see some of the columns because of their places.
  __device__ __forceinline__ bool hides(int row, int height, int column, int width) const {
    return (CAUSAL && column + width > row + 1 + shift + right) ||
           (LEFT && column < row + height - 1 + shift - left);
  }

  // Between which columns all lie that some of `height` rows see; the first a multiple of `step`.
  __device__ __forceinline__ int columns_begin(int row, int step) const {
    return LEFT ? not_below_0(row + shift - left) / step * step : 0;
  }
  __device__ __forceinline__ int columns_end(int row, int height) const {
    return CAUSAL ? smaller(columns, row + height + shift + right) : columns;
  }

  // Between which rows all lie that see some of `width` columns.
  __device__ __forceinline__ int rows_begin(int column, int step) const {
    return CAUSAL ? not_below_0(column - shift - right) / step * step : 0;
  }
  __device__ __forceinline__ int rows_end(int column, int width) const {
    return LEFT ? smaller(rows, column + width - shift + left) : rows;
  }
};

// Kernels name their parameters so that these stand for what a block works on: SPAN(entry) its
// rows and columns, MOST_ROWS and MOST_COLUMNS what the grid is made for, ENTRY(entry) where an
// entry's log_sum and delta stand.
#if PACKED
// Sequence n has the queries from q_starts[n] to before q_starts[n + 1], and keys likewise. One
// that is longer than the grid is made for, or that does not stand behind the one before and inside
// of the operands, is reported, and empty here: nothing else is read or written.
__device__ __forceinline__ bool found_sequence(
    const int* starts, i64 number, i64 count, i64 length, i64 longest, i64& first, int& size) {
  const i64 begin = starts[number], end = starts[number + 1];
  first = begin;
  size = (int)(end - begin);
  return begin >= 0 && begin <= end && end <= length && end - begin <= longest &&
         (number > 0 || begin == 0) && (number + 1 < count || end == length);
}

__device__ __forceinline__ Span span_of_sequence(
    const int* q_starts, const int* k_starts, i64* error, i64 number, i64 count, i64 length,
    i64 key_length, i64 max_q, i64 max_k, i64 left, i64 right) {
  Span made;
  const bool queries = found_sequence(
      q_starts, number, count, length, max_q, made.first_row, made.rows);
  const bool keys = found_sequence(
      k_starts, number, count, key_length, max_k, made.first_column, made.columns);
  if (!queries || !keys) {
    error[1] = number * 2 + queries;  // 2 n: of the queries, 2 n + 1: of the keys
    error[0] = 1;
    made.rows = made.columns = 0;
  }
  made.shift = made.columns - made.rows;
  made.left = (int)left;
  made.right = (int)right;
  return made;
}

#define SPAN(entry)                                                                         \
  span_of_sequence(q_starts, k_starts, error, entry, sequences, length, key_length, max_q, \
                   max_k, left, right)
#define MOST_ROWS max_q
#define MOST_COLUMNS max_k
#define ENTRY(entry) 0
#else
#define SPAN(entry) Span{(int)length, (int)key_length}
#define MOST_ROWS length
#define MOST_COLUMNS key_length
#define ENTRY(entry) (entry)
#endif

// The scores of one head.
struct Scores : Span {
  Wide scale;
#if MASK == SLOPES
  Wide slope;

  __device__ __forceinline__ void read_mask(const MaskElement* place, i64, i64) {
    slope = (Wide)*place;
  }

  __device__ __forceinline__ Wide masked_value(int row, int column) const {
    const int distance = row + shift - column;
    return slope * (Wide)(distance < 0 ? distance : -distance);
  }
#elif MASK
  const MaskElement* mask;  // of its (0, 0)
  i64 row_step, column_step;

  __device__ __forceinline__ void read_mask(const MaskElement* place, i64 row, i64 column) {
    mask = place;
    row_step = row;
    column_step = column;
  }

  __device__ __forceinline__ Wide masked_value(int row, int column) const {
    const MaskElement* place = mask + row * row_step + column * column_step;
#if MASK == FLOAT32_MASK
    return (Wide)*place;
#elif MASK == ELEMENT_MASK
    return load_element(place);
#else
    return *place ? (Wide)0 : (Wide)MINUS_INFINITY;
#endif
  }
#else
  __device__ __forceinline__ Wide masked_value(int, int) const { return (Wide)0; }
#endif
};

__device__ __forceinline__ Scores scores_of(const Span& span, Wide scale) {
  Scores made;
  (Span&)made = span;
  made.scale = scale;
  return made;
}

// Which elements of one head's (L, S) are dropped. Its rows are padded to `pitch`, S rounded up to
// a multiple of 64, so that the four words of a block belong to columns c, c + 16, c + 32, c + 48.
struct Dropout {
  u64 seed, offset;
  u64 first;      // position of (0, 0)
  u64 pitch;
  u32 threshold;  // an element is kept where the upper 24 bits of its word are not below
  Wide gain;      // 1 / (1 - p)

  // The words of columns 64 group + place + 16 i of a row.
  __device__ __forceinline__ Words words(int row, int group, int place) const {
    const u64 position = first + row * pitch;
    return random_words(seed, offset + position / 4 + (u64)group * 16 + place);
  }

  __device__ __forceinline__ bool keeps(u32 word) const { return (word >> 8) >= threshold; }

  // One element alone: a whole block for one word of it.
  __device__ __forceinline__ bool keeps(int row, int column) const {
    const Words found = words(row, column / 64, column % 16);
    const int number = column / 16 % 4;
    const u32 low = number % 2 ? found.word[1] : found.word[0];
    const u32 high = number % 2 ? found.word[3] : found.word[2];
    return keeps(number / 2 ? high : low);
  }
};

__device__ __forceinline__ Dropout dropout_of(
    const i64* seed, const i64* offset, i64 head, i64 rows, i64 columns, i64 threshold, i64 gain) {
  Dropout made;
  made.seed = (u64)*seed;
  made.offset = (u64)*offset;
  made.pitch = (u64)((columns + 63) / 64 * 64);
  made.first = (u64)(head * rows) * made.pitch;
  made.threshold = (u32)threshold;
  made.gain = (Wide)number_of(gain);
  return made;
}
