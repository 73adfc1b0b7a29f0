// Which probabilities of a warp's tile are kept, as bits: element [m][n][i] of the accumulators has
// bit 4 (n % 8) + i of word [m][n / 8].
#include "attention.cuh"
#include "flash_tiles.cuh"

template <int M, int N>
struct KeepBits {
  u32 word[M][(N + 7) / 8];

  __device__ __forceinline__ bool keeps(int m, int n, int i) const {
    return word[m][n / 8] >> (4 * (n % 8) + i) & 1;
  }

  __device__ __forceinline__ void note(int m, int n, int i, bool kept) {
    word[m][n / 8] |= (u32)kept << (4 * (n % 8) + i);
  }

  // Rows of the tile are queries, columns keys: four columns of a thread share a block of words.
  // Tiles begin at multiples of their width, so one is whole groups of 64 columns, or half a group.
  __device__ __forceinline__ void draw_by_rows(const Dropout& dropout, int row, int column) {
    static_assert(N == 4 || N % 8 == 0, "tiles are 32 columns wide, or a multiple of 64");
    constexpr int WORDS = N == 4 ? 2 : 4;
    const int lane = (int)(threadIdx.x % 32);
    const bool upper = N == 4 && column % 64;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int group = 0; group < (N + 7) / 8; ++group) {
        word[m][group] = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int y = row + 16 * m + lane / 4 + 8 * (i / 2);
            const int place = 2 * (lane % 4) + i % 2 + 8 * half;
            const Words found = dropout.words(y, column / 64 + group, place);
#pragma unroll
            for (int k = 0; k < WORDS; ++k)
              note(m, 8 * group + 2 * k + half, i,
                   dropout.keeps(upper ? found.word[(k + 2) % 4] : found.word[k]));
          }
      }
  }

  // Rows of the tile are keys, columns queries: a block of words for each element.
  __device__ __forceinline__ void draw_by_columns(const Dropout& dropout, int row, int column) {
    const int lane = (int)(threadIdx.x % 32);
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < N; ++n) {
        if (n % 8 == 0) word[m][n / 8] = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          note(m, n, i, dropout.keeps(column + 8 * n + 2 * (lane % 4) + i % 2,
                                      row + 16 * m + lane / 4 + 8 * (i / 2)));
      }
  }
};
