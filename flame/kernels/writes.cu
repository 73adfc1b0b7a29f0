// Writing where index tensors say, without races: entries in the order of their targets.
//
// Element i of index n is index<n>[ENTRY<n>(i)]. Elements stand line after line; those of different
// lines never meet.

typedef long long i64;
#define THREADS 256
#define NO_KEY ((KEY)~0ull)
#define REPORTED (1ll << 58)  // indices beyond are reported as this

// key = the offset that an element's indices give; NO_KEY and a report where one is out of range.
extern "C" __global__ void __launch_bounds__(THREADS) find_targets(
    INDEX_POINTERS KEY* keys, unsigned* entries, i64* error, i64 count, i64 length, i64 wrap
    INDEX_SIZES ENTRY_PARAMS) {
  i64 e = (i64)blockIdx.x * THREADS + threadIdx.x;
  if (e >= count) return;
  i64 offset = 0;
  bool good = true;
#define TARGET(n)                                                              \
  {                                                                            \
    i64 found = index##n[ENTRY##n(e)];                                         \
    if (found < (wrap ? -size##n : 0) || found >= size##n) {                   \
      found = found < -REPORTED ? -REPORTED : found > REPORTED ? REPORTED : found; \
      error[1] = found * 8 + n;                                                \
      error[0] = 1;                                                            \
      good = false;                                                            \
    } else {                                                                   \
      offset += (found < 0 ? found + size##n : found) * jump##n;               \
    }                                                                          \
  }
  TARGETS_OF_ENTRY
  keys[e] = good ? (KEY)offset : NO_KEY;
  entries[e] = (unsigned)(e % length);
}
