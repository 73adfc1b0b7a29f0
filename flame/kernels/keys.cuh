// Elements as unsigned integers in the same order.
//
// T: the element's bits as an unsigned or signed integer type; KIND 0: unsigned, 1: signed,
// 2: floating; BITS: width of an element; INFINITY_BITS: its infinity, if floating; KEY: the
// unsigned type of a key, at least as wide; DESCENDING: whether the order is turned round.
// NaN is the largest value, and both zeros are equal.

#define ALL_ONES ((KEY)(~0ull >> (64 - BITS)))
#define TOP_BIT ((KEY)1 << (BITS - 1))

__device__ __forceinline__ KEY key_of(T raw) {
#if KIND == 2
  KEY bits = (KEY)raw & ALL_ONES, magnitude = bits & ~TOP_BIT, key;
  if (magnitude > (KEY)INFINITY_BITS) key = ALL_ONES;
  else if (magnitude == 0) key = TOP_BIT;
  else key = (bits & TOP_BIT) ? (ALL_ONES & ~bits) : (bits | TOP_BIT);
#elif KIND == 1
  KEY key = ((KEY)raw & ALL_ONES) ^ TOP_BIT;
#else
  KEY key = (KEY)raw;
#endif
  return DESCENDING ? (KEY)(ALL_ONES & ~key) : key;
}

// The keys of a NaN, and of nothing: what fills up a tile comes last.
#define NAN_KEY (DESCENDING ? (KEY)0 : ALL_ONES)
#define NO_KEY ALL_ONES
