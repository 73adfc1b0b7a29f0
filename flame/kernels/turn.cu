// Copies that turn: the source lies along rows, the target along columns, of many matrices.
//
// A block takes a tile of ROWS x COLS elements through shared memory: it reads whole lines of the
// source and writes whole lines of the target, 16 bytes a thread where they are aligned. Short rows
// that lie one behind the other (SHORT_ROWS: ROWS is all of them) are one line, short columns of the
// target (SHORT_COLS: COLS is all of them) as well.
//
// Element (r, c) of matrix b is read at LINE0(b) + c * x_step + r, written at LINE1(b) + r * y_step
// + c. IN, OUT: elements; MOVE(v): one converted.

#if USES_HALF
#include <cuda_fp16.h>
#endif
#if USES_BFLOAT16
#include <cuda_bf16.h>
#endif

#define THREADS 256
#define WIDE_X (16 / (int)sizeof(IN))
#define WIDE_Y (16 / (int)sizeof(OUT))
// an odd number of words, so that a column's elements lie in different banks
#define PITCH (COLS + (sizeof(IN) >= 4 ? 1 : 4 / (int)sizeof(IN)))

template <typename T, int N>
struct alignas(16) Line {
  T item[N];
};

__device__ __forceinline__ bool whole_lines(const void* memory, long long step, int nbytes) {
  return (unsigned long long)memory % 16 == 0 && step * nbytes % 16 == 0;
}

extern "C" __global__ void __launch_bounds__(THREADS) turn(
    const IN* source, OUT* target, long long rows, long long columns, long long x_step,
    long long y_step, long long row_tiles, long long column_tiles LINE_PARAMS) {
  __shared__ IN tile[ROWS * PITCH];
  const long long matrix = blockIdx.x / (row_tiles * column_tiles);
  const long long place = blockIdx.x % (row_tiles * column_tiles);
  const long long first_row = place / column_tiles * ROWS;
  const long long first_column = place % column_tiles * COLS;
  const int height = (int)min(rows - first_row, (long long)ROWS);
  const int width = (int)min(columns - first_column, (long long)COLS);
  const IN* x = source + LINE0(matrix) + first_column * x_step + first_row;
  OUT* y = target + LINE1(matrix) + first_row * y_step + first_column;

#if SHORT_ROWS
  const int count = ROWS * width;
  const bool packed = whole_lines(x, 0, 0);
  for (int e = threadIdx.x * WIDE_X; e < count; e += THREADS * WIDE_X) {
    Line<IN, WIDE_X> line;
    const bool whole = packed && e + WIDE_X <= count;
    if (whole) line = *(const Line<IN, WIDE_X>*)(x + e);
    #pragma unroll
    for (int j = 0; j < WIDE_X; ++j) {
      if (e + j < count) {
        if (!whole) line.item[j] = x[e + j];
        tile[(e + j) % ROWS * PITCH + (e + j) / ROWS] = line.item[j];
      }
    }
  }
#else
  const bool packed = whole_lines(x, x_step, sizeof(IN));
  #pragma unroll 4
  for (int q = threadIdx.x; q < ROWS / WIDE_X * COLS; q += THREADS) {
    const int c = q / (ROWS / WIDE_X), r = q % (ROWS / WIDE_X) * WIDE_X;
    if (c < width && r < height) {
      Line<IN, WIDE_X> line;
      const bool whole = packed && r + WIDE_X <= height;
      if (whole) line = *(const Line<IN, WIDE_X>*)(x + c * x_step + r);
      #pragma unroll
      for (int j = 0; j < WIDE_X; ++j) {
        if (r + j < height) {
          if (!whole) line.item[j] = x[c * x_step + r + j];
          tile[(r + j) * PITCH + c] = line.item[j];
        }
      }
    }
  }
#endif
  __syncthreads();
#if SHORT_COLS
  const int total = height * COLS;
  const bool lines = whole_lines(y, 0, 0);
  for (int e = threadIdx.x * WIDE_Y; e < total; e += THREADS * WIDE_Y) {
    Line<OUT, WIDE_Y> line;
    const bool whole = lines && e + WIDE_Y <= total;
    #pragma unroll
    for (int j = 0; j < WIDE_Y; ++j) {
      if (e + j < total) {
        line.item[j] = MOVE(tile[(e + j) / COLS * PITCH + (e + j) % COLS]);
        if (!whole) y[e + j] = line.item[j];
      }
    }
    if (whole) *(Line<OUT, WIDE_Y>*)(y + e) = line;
  }
#else
  const bool lines = whole_lines(y, y_step, sizeof(OUT));
  for (int q = threadIdx.x; q < ROWS * (COLS / WIDE_Y); q += THREADS) {
    const int r = q / (COLS / WIDE_Y), c = q % (COLS / WIDE_Y) * WIDE_Y;
    if (r < height && c < width) {
      Line<OUT, WIDE_Y> line;
      const bool whole = lines && c + WIDE_Y <= width;
      #pragma unroll
      for (int j = 0; j < WIDE_Y; ++j) {
        if (c + j < width) {
          line.item[j] = MOVE(tile[r * PITCH + c + j]);
          if (!whole) y[r * y_step + c + j] = line.item[j];
        }
      }
      if (whole) *(Line<OUT, WIDE_Y>*)(y + r * y_step + c) = line;
    }
  }
#endif
}
