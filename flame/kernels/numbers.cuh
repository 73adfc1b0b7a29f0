// Integers by width, and the conversions between float32 and the element type of a kernel.
//
// ELEMENT, defined in front of the text, is one of the four codes below; `Element` is how one lies
// in memory, `Wide` what is computed with. 16-bit floats are held as their bits, so that no header
// of the toolkit is needed. Under FLAME_HOST the conversions are plain C++.
#define FLOAT16 0
#define BFLOAT16 1
#define FLOAT32 2
#define FLOAT64 3

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#if ELEMENT == FLOAT64
typedef double Element;
typedef double Wide;
#elif ELEMENT == FLOAT32
typedef float Element;
typedef float Wide;
#else
typedef u16 Element;
typedef float Wide;
#endif

// Names the block's dynamic shared memory.
#ifdef FLAME_HOST
#define DYNAMIC_SHARED(name) unsigned char* name = flame_host_dynamic_shared()
#else
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

#define MINUS_INFINITY (-__int_as_float(0x7f800000))
#define LOG2_E 1.4426950408889634f
#define LOG_2 0.6931471805599453f

// A number that arrives as the bits of a float64.
__device__ __forceinline__ double number_of(i64 bits) { return __longlong_as_double(bits); }

#if ELEMENT == FLOAT16 || ELEMENT == BFLOAT16

// The float32 of the 16 low bits.
__device__ __forceinline__ float widen(u32 bits) {
#if ELEMENT == BFLOAT16
  return __int_as_float((int)(bits << 16));
#elif defined(FLAME_HOST)
  union { u16 bits; _Float16 value; } both;
  both.bits = (u16)bits;
  return (float)both.value;
#else
  float value;
  asm("cvt.f32.f16 %0, %1;\n" : "=f"(value) : "h"((u16)bits));
  return value;
#endif
}

// Two floats rounded to nearest even, `low` in the low half.
__device__ __forceinline__ u32 narrow_pair(float low, float high) {
#ifdef FLAME_HOST
  u32 bits[2];
  const float values[2] = {low, high};
  for (int i = 0; i < 2; ++i) {
#if ELEMENT == BFLOAT16
    const u32 whole = (u32)__float_as_int(values[i]);
    const bool nan = (whole & 0x7fffffff) > 0x7f800000;
    bits[i] = nan ? 0x7fff : (whole + 0x7fff + ((whole >> 16) & 1)) >> 16;
#else
    union { u16 bits; _Float16 value; } both;
    both.value = (_Float16)values[i];
    bits[i] = both.bits;
#endif
  }
  return bits[0] | (bits[1] << 16);
#else
  u32 pair;
#if ELEMENT == BFLOAT16
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(pair) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(pair) : "f"(high), "f"(low));
#endif
  return pair;
#endif
}

__device__ __forceinline__ Wide load_element(const Element* place) { return widen(*place); }
__device__ __forceinline__ void store_element(Element* place, Wide value) {
  *place = (u16)narrow_pair(value, 0.0f);
}

#else

__device__ __forceinline__ Wide load_element(const Element* place) { return *place; }
__device__ __forceinline__ void store_element(Element* place, Wide value) { *place = value; }

#endif

// 2 to the power x, within 2 ulp; 0 for -inf.
__device__ __forceinline__ float power_of_2(float x) {
#ifdef FLAME_HOST
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
#endif
}
