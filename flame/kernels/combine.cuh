// combined(a, b): how two values for one place become one. COMBINE says which way; a NaN stays.

#define COMBINE_ADD 0
#define COMBINE_MULTIPLY 1
#define COMBINE_MAX 2
#define COMBINE_MIN 3

__device__ __forceinline__ WIDE combined(WIDE a, WIDE b) {
#if COMBINE == COMBINE_ADD
  return a + b;
#elif COMBINE == COMBINE_MULTIPLY
  return a * b;
#elif COMBINE == COMBINE_MAX
  return a > b || a != a ? a : b;
#else
  return a < b || a != a ? a : b;
#endif
}
