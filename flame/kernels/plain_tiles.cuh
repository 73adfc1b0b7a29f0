// Tiles of attention in plain multiplications and additions: any element type, any strides.
//
// A block is 16 x 16 threads; thread (y, x) owns rows y + 16 i and columns x + 16 j of the block's
// (16 M, 16 N) scores. Tiles in shared memory are rows of Wide numbers with one more column, so
// that a column of 16 rows, which the threads x read at once, lies in different banks.
#include "attention.cuh"

constexpr int THREADS = 256;
constexpr int ROWS = 16 * M_TILES;
constexpr int COLUMNS = 16 * N_TILES;
constexpr int E_TILES = (HEAD + 15) / 16 + (HEAD == 0);
constexpr int V_TILES = (HEAD_V + 15) / 16 + (HEAD_V == 0);

__device__ __forceinline__ int thread_x() { return (int)(threadIdx.x % 16); }
__device__ __forceinline__ int thread_y() { return (int)(threadIdx.x / 16); }

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }

// A matrix in device memory: steps in elements between rows and between columns.
struct Matrix {
  const Element* base;
  i64 row, column;
};

// HEIGHT rows of E elements from row `first` on, zeros from row `end` on.
template <int HEIGHT, int E>
__device__ __forceinline__ void load_tile(Wide* tile, const Matrix& from, int first, int end) {
  for (int number = (int)threadIdx.x; number < HEIGHT * E; number += THREADS) {
    const int row = number / (E ? E : 1), column = number % (E ? E : 1);
    const Element* place = from.base + (first + row) * from.row + column * from.column;
    tile[row * (E + 1) + column] = first + row < end ? load_element(place) : (Wide)0;
  }
}

// found = rows of one tile times rows of another, both of width E.
template <int E>
__device__ __forceinline__ void multiply_rows(
    Wide (&found)[M_TILES][N_TILES], const Wide* rows, const Wide* columns) {
#pragma unroll
  for (int i = 0; i < M_TILES; ++i)
#pragma unroll
    for (int j = 0; j < N_TILES; ++j) found[i][j] = 0;
#pragma unroll 4
  for (int e = 0; e < E; ++e) {
    Wide left[M_TILES], right[N_TILES];
#pragma unroll
    for (int i = 0; i < M_TILES; ++i) left[i] = rows[(thread_y() + 16 * i) * (E + 1) + e];
#pragma unroll
    for (int j = 0; j < N_TILES; ++j) right[j] = columns[(thread_x() + 16 * j) * (E + 1) + e];
#pragma unroll
    for (int i = 0; i < M_TILES; ++i)
#pragma unroll
      for (int j = 0; j < N_TILES; ++j) found[i][j] += left[i] * right[j];
  }
}

// A thread's weights into the block's tile (ROWS, COLUMNS).
__device__ __forceinline__ void share_weights(Wide* tile, const Wide (&weights)[M_TILES][N_TILES]) {
#pragma unroll
  for (int i = 0; i < M_TILES; ++i)
#pragma unroll
    for (int j = 0; j < N_TILES; ++j)
      tile[(thread_y() + 16 * i) * (COLUMNS + 1) + thread_x() + 16 * j] = weights[i][j];
}

// sums (rows, E) += weights (rows, columns) values (columns, E); a thread's columns are x + 16 e.
template <int E, int TILES>
__device__ __forceinline__ void multiply_columns(
    Wide (&sums)[M_TILES][TILES], const Wide* weights, const Wide* values) {
#pragma unroll 2
  for (int n = 0; n < COLUMNS; ++n) {
    Wide left[M_TILES];
#pragma unroll
    for (int i = 0; i < M_TILES; ++i) left[i] = weights[(thread_y() + 16 * i) * (COLUMNS + 1) + n];
#pragma unroll
    for (int e = 0; e < TILES; ++e) {
      const int column = thread_x() + 16 * e;
      const Wide right = column < E ? values[n * (E + 1) + column] : (Wide)0;
#pragma unroll
      for (int i = 0; i < M_TILES; ++i) sums[i][e] += left[i] * right;
    }
  }
}

template <int TILES>
__device__ __forceinline__ void clear(Wide (&sums)[M_TILES][TILES]) {
#pragma unroll
  for (int i = 0; i < M_TILES; ++i)
#pragma unroll
    for (int e = 0; e < TILES; ++e) sums[i][e] = 0;
}

// Writes a thread's elements of one of its rows.
template <int E, int TILES>
__device__ __forceinline__ void store_row(
    Element* row, i64 column_step, const Wide (&sums)[TILES], Wide factor) {
#pragma unroll
  for (int e = 0; e < TILES; ++e) {
    const int column = thread_x() + 16 * e;
    if (column < E) store_element(row + column * column_step, sums[e] * factor);
  }
}

// The score of a query and a key, of their product.
__device__ __forceinline__ Wide score_of(const Scores& scores, Wide product, int query, int key) {
  if (!scores.inside(query, key)) return (Wide)MINUS_INFINITY;
#if MASK
  return product * scores.scale + scores.masked_value(query, key);
#else
  return product * scores.scale;
#endif
}
