// What all attention kernels share: how a product of query and key becomes a score, and which
// probabilities are dropped.
//
//   score(i, j)  = scale q_i . k_j + mask(i, j); -inf where masked, and if causal where j > i
//   P(i, j)      = exp(score(i, j) - log_sum(i)),  log_sum(i) = log sum_j exp score(i, j)
//   result(i)    = sum_j P(i, j) Z(i, j) v_j,      Z = 0 where dropped, else 1 / (1 - p)
// A row that is masked throughout gives 0, and its log_sum is 0.
//
// Defined in front of the text: ELEMENT (numbers.cuh); HEAD and HEAD_V, the widths E and Ev; CAUSAL
// and DROPOUT, 0 or 1; MASK, one of the codes below; HOLDS, the sizes of the launch's tiles.
//
// Query heads share key heads: head h reads key head h / (heads / key_heads). Masks are addressed
// by strides, 0 where they broadcast. Offsets of rows are 64-bit.
#include "philox.cuh"

#define NO_MASK 0
#define BOOL_MASK 1     // bytes, other than 0 takes part
#define ELEMENT_MASK 2  // of the operands' dtype, added
#define FLOAT32_MASK 3  // added

#if MASK == FLOAT32_MASK
typedef float MaskElement;
#elif MASK == ELEMENT_MASK
typedef Element MaskElement;
#else
typedef unsigned char MaskElement;
#endif

__device__ __forceinline__ int smaller(i64 a, i64 b) { return (int)(a < b ? a : b); }

// The scores of one head.
struct Scores {
  const MaskElement* mask;  // of its (0, 0)
  i64 row_step, column_step;
  int rows, columns;  // L, S
  Wide scale;

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

  // How many columns a row may see, from `column` on.
  __device__ __forceinline__ int seen(int row, int column) const {
    const int behind = columns - column, own = row + 1 - column;
    return CAUSAL && own < behind ? own : behind;
  }

  __device__ __forceinline__ bool inside(int row, int column) const {
    return row < rows && seen(row, column) > 0;
  }

  // Whether a tile has columns that are not `inside` for some of its rows. Rows behind the end are
  // zeros in shared memory and do no harm.
  __device__ __forceinline__ bool ragged(int row, int column, int width) const {
    return column + width > columns || (CAUSAL && column + width > row + 1);
  }
};

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
