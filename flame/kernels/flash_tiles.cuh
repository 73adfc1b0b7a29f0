// Tiles of attention on tensor cores, for 16-bit elements.
//
// A tile is ROWS rows of E elements in shared memory, padded to WIDTH, the next multiple of 32.
// Rows are cut into chunks of 16 bytes, and chunk c of row r stands at chunk c ^ f(r) of it, with
// f such that chunk c of 8 neighbouring rows lies in 8 different groups of 4 banks: neither copies
// nor matrix loads meet a bank conflict. Columns E .. up to a multiple of 16 hold zeros.
//
// A warp owns M_TILES x 16 rows of the tile that stays, and meets all columns of the tile that
// streams by: accumulators are [M_TILES][columns / 8][4], see tensor_core.cuh for their layout.
#include "tensor_core.cuh"

__host__ __device__ constexpr int padded_width(int width) { return (width + 31) / 32 * 32; }
__host__ __device__ constexpr int steps_of_16(int width) { return (width + 15) / 16; }
__host__ __device__ constexpr int tile_bytes(int rows, int width) {
  return rows * padded_width(width) * 2;
}

// Byte offset of a chunk in a tile.
template <int WIDTH>
__device__ __forceinline__ int chunk_offset(int row, int chunk) {
  const int turn = WIDTH % 64 ? (row >> 1) & 3 : row & 7;
  return row * (WIDTH * 2) + ((chunk ^ turn) << 4);
}

// A matrix in device memory: rows of E elements, `step` elements apart.
struct Rows {
  const u16* base;
  i64 step;
  bool aligned;  // whether 16-byte accesses may be used
};

__device__ __forceinline__ bool fits_16_bytes(const void* base, i64 step) {
  return (((u64)base | (u64)(step * 2)) & 15) == 0;
}

__device__ __forceinline__ Rows rows_of(const u16* base, i64 step) {
  return Rows{base, step, fits_16_bytes(base, step)};
}

// A thread's share of an aligned tile. Where chunks divide the threads it keeps its column, and
// goes from row to row by additions. WHOLE: no row is behind the end.
template <int ROWS, int E, int THREADS, bool WHOLE>
__device__ __forceinline__ void load_chunks(
    SharedAddress target, const Rows& rows, int first, int end) {
  constexpr int CHUNKS = E / 8, WIDTH = padded_width(E);
  constexpr int PASSES = (ROWS * CHUNKS + THREADS - 1) / THREADS;
  constexpr bool COLUMN_STAYS = THREADS % CHUNKS == 0;
  constexpr int STEP = COLUMN_STAYS ? THREADS / CHUNKS : 1;  // rows
  const int start = thread_anew();
  const u16* source =
      rows.base + (i64)(first + start / CHUNKS) * rows.step + start % CHUNKS * 8;
#pragma unroll
  for (int i = 0; i < PASSES; ++i) {
    const int number = i * THREADS + start;
    const int row = COLUMN_STAYS ? start / CHUNKS + i * STEP : number / CHUNKS;
    const int chunk = COLUMN_STAYS ? start % CHUNKS : number % CHUNKS;
    if (!COLUMN_STAYS) source = rows.base + (i64)(first + row) * rows.step + chunk * 8;
    if (ROWS * CHUNKS % THREADS == 0 || row < ROWS) {
      const SharedAddress place = target + chunk_offset<WIDTH>(row, chunk);
      if (WHOLE) copy_16(place, source);
      else copy_16(place, source, first + row < end);
    }
    if (COLUMN_STAYS) source += STEP * rows.step;
  }
}

// Starts to copy rows first .. first + ROWS into a tile, zeros from row `end` on. Complete after
// copy_wait and a barrier.
template <int ROWS, int E, int THREADS>
__device__ __forceinline__ void load_tile(
    unsigned char* tile, const Rows& rows, int first, int end) {
  if (rows.aligned && first + ROWS <= end) {
    load_chunks<ROWS, E, THREADS, true>(shared_address(tile), rows, first, end);
  } else if (rows.aligned) {
    load_chunks<ROWS, E, THREADS, false>(shared_address(tile), rows, first, end);
  } else {
#pragma unroll 1
    for (int number = thread_anew(); number < ROWS * E; number += THREADS) {
      const int row = number / E, column = number % E;
      u16* place = (u16*)(tile + chunk_offset<padded_width(E)>(row, column / 8)) + column % 8;
      *place = first + row < end ? rows.base[(i64)(first + row) * rows.step + column] : (u16)0;
    }
  }
}

// Zeros in the chunk behind an odd number of them, once: load_tile never writes there.
template <int ROWS, int E, int THREADS>
__device__ __forceinline__ void clear_padding(unsigned char* tile) {
  if (E % 16) {
    for (int number = (int)threadIdx.x; number < ROWS * 8; number += THREADS) {
      const int place = chunk_offset<padded_width(E)>(number / 8, E / 8);
      ((u16*)(tile + place))[number % 8] = 0;
    }
  }
}

// A lane's address of chunk `half` (0 or 1) of a row of a tile; `moved` leads from there to other
// steps of 16 columns and other multiples of 16 rows, by constants: tiles are aligned to 128
// bytes.
template <int E>
__device__ __forceinline__ SharedAddress lane_start(SharedAddress tile, int row, int half) {
  return tile + chunk_offset<padded_width(E)>(row, half);
}

template <int E>
__device__ __forceinline__ SharedAddress moved(SharedAddress start, int row, int step) {
  constexpr int TURNED = padded_width(E) % 64 ? 3 : 7;  // bits of a chunk's number that turn
  const int kept = 2 * step & ~TURNED, turned = 2 * step & TURNED;
  return (SharedAddress)((AddressBits)start ^ (AddressBits)(turned << 4)) + (kept << 4) +
         row * padded_width(E) * 2;
}

// Rows row .. row + 15 of a tile, as A.
template <int E>
__device__ __forceinline__ SharedAddress start_of_a(SharedAddress tile, int row) {
  const int lane = (int)(threadIdx.x % 32);
  return lane_start<E>(tile, row + lane % 16, lane / 16);
}

// The transpose of 16 rows of a tile, as two B of 8 of its columns.
template <int E>
__device__ __forceinline__ SharedAddress start_of_rows(SharedAddress tile) {
  const int lane = (int)(threadIdx.x % 32);
  return lane_start<E>(tile, lane / 16 * 8 + lane % 8, lane / 8 % 2);
}

// 16 rows of a tile, as two B of 8 columns: to be loaded transposed.
template <int E>
__device__ __forceinline__ SharedAddress start_of_columns(SharedAddress tile) {
  const int lane = (int)(threadIdx.x % 32);
  return lane_start<E>(tile, lane % 16, lane / 16);
}

template <int M, int N>
__device__ __forceinline__ void clear(float (&sums)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[m][n][i] = 0.0f;
}

// One step of a sum of products, which the first begins.
__device__ __forceinline__ void multiply_step(
    float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1, int step) {
  if (step == 0) multiply<true>(sums, a, b0, b1);
  else multiply(sums, a, b0, b1);
}

// sums (rows, columns) = own (rows from `row` on, E) stream (columns, E)^T.
template <int E, int M, int N>
__device__ __forceinline__ void multiply_rows(
    float (&sums)[M][N][4], SharedAddress own, int row, SharedAddress stream) {
  const SharedAddress a_start = start_of_a<E>(own, row), b_start = start_of_rows<E>(stream);
#pragma unroll
  for (int step = 0; step < steps_of_16(E); ++step) {
    u32 a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) load_matrices(a[m], moved<E>(a_start, 16 * m, step));
#pragma unroll
    for (int n = 0; n < N / 2; ++n) {
      u32 b[4];
      load_matrices(b, moved<E>(b_start, 16 * n, step));
#pragma unroll
      for (int m = 0; m < M; ++m) {
        multiply_step(sums[m][2 * n], a[m], b[0], b[1], step);
        multiply_step(sums[m][2 * n + 1], a[m], b[2], b[3], step);
      }
    }
  }
}

// sums (rows, E) += weights (rows, columns), rounded to elements, times stream (columns, E).
template <int E, int M, int N, int E_TILES>
__device__ __forceinline__ void multiply_columns(
    float (&sums)[M][E_TILES][4], const float (&weights)[M][N][4],
    SharedAddress stream) {
  static_assert(E_TILES == 2 * steps_of_16(E), "accumulators cover the padded width");
  const SharedAddress start = start_of_columns<E>(stream);
#pragma unroll
  for (int step = 0; step < N / 2; ++step) {
    u32 a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float(&from)[4] = weights[m][2 * step + half];
        a[m][2 * half] = narrow_pair(from[0], from[1]);
        a[m][2 * half + 1] = narrow_pair(from[2], from[3]);
      }
#pragma unroll
    for (int n = 0; n < E_TILES / 2; ++n) {
      u32 b[4];
      load_matrices_transposed(b, moved<E>(start, 16 * step, n));
#pragma unroll
      for (int m = 0; m < M; ++m) {
        multiply(sums[m][2 * n], a[m], b[0], b[1]);
        multiply(sums[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Writes 16 rows of a warp, those below `end`, times a factor for each of a thread's two rows.
template <int E, int E_TILES>
__device__ __forceinline__ void store_rows(
    u16* base, i64 step, int row, int end, const float (&sums)[E_TILES][4], float first,
    float second) {
  const int lane = (int)(threadIdx.x % 32);
  const bool pairs = (((u64)base | (u64)(step * 2)) & 3) == 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int place = row + lane / 4 + 8 * half;
    if (place >= end) continue;
    const float factor = half ? second : first;
    u16* target = base + place * step + 2 * (lane % 4);
#pragma unroll
    for (int n = 0; n < E / 8; ++n) {
      const u32 pair = narrow_pair(sums[n][2 * half] * factor, sums[n][2 * half + 1] * factor);
      if (pairs) {
        *(u32*)(target + 8 * n) = pair;
      } else {
        target[8 * n] = (u16)pair;
        target[8 * n + 1] = (u16)(pair >> 16);
      }
    }
  }
}
