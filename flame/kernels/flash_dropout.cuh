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

  // Rows of the tile are keys, columns queries: bits that draw_by_columns left in shared memory,
  // for a warp whose first row is `row`.
  template <int OWN>
  __device__ __forceinline__ void read_columns(const u16* drawn, int row) {
    const int lane = (int)(threadIdx.x % 32);
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < N; ++n) {
        if (n % 8 == 0) word[m][n / 8] = 0;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int x = 8 * n + 2 * (lane % 4) + i;
          const u32 keys = (u32)drawn[x * (OWN / 16) + row / 16 + m] >> (lane / 4);
          note(m, n, i, keys & 1);
          note(m, n, i + 2, keys >> 8 & 1);
        }
      }
  }
};

// The block draws for OWN keys from `key` on and STREAM queries from `column` on: drawn
// (STREAM, OWN / 16), a bit for each of 16 keys. A thread of a tile of keys owns one key in 64 of
// a query, so it would use one of four words; the threads of a warp pool theirs.
template <int OWN, int STREAM, int BLOCK>
__device__ __forceinline__ void draw_by_columns(
    u16* drawn, const Dropout& dropout, int key, int column) {
  constexpr int PAIRS = STREAM / 2, GROUPS = (OWN + 63) / 64, WARPS_OF_BLOCK = BLOCK / 32;
  const int lane = (int)(threadIdx.x % 32);
  const int skipped = key % 64 / 16;  // other than 0 where tiles are half a group
  for (int number = (int)(threadIdx.x / 32); number < PAIRS * GROUPS; number += WARPS_OF_BLOCK) {
    const int query = number % PAIRS * 2, group = number / PAIRS;
    const Words found = dropout.words(column + query + lane / 16, key / 64 + group, lane % 16);
    u32 own = 0;  // what lane k + 4 q writes: 16 keys of word k for query q of the pair
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const u32 kept = __ballot_sync(0xffffffffu, dropout.keeps(found.word[k]));
      if (lane % 4 == k) own = lane / 4 ? kept >> 16 : kept;
    }
    const int place = 4 * group + lane % 4 - skipped;
    if (lane < 8 && place >= 0 && place < OWN / 16)
      drawn[(query + lane / 4) * (OWN / 16) + place] = (u16)own;
  }
}
