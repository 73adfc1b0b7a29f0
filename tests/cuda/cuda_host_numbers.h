// Numbers of the device on the host: bit patterns, integer intrinsics, half-width floats, atomics.
#pragma once

template <typename T, typename S>
static inline T flame_bits(S x) {
  static_assert(sizeof(T) == sizeof(S), "bit patterns of two widths");
  T made;
  memcpy(&made, &x, sizeof x);
  return made;
}

static inline int __float_as_int(float x) { return flame_bits<int>(x); }
static inline unsigned __float_as_uint(float x) { return flame_bits<unsigned>(x); }
static inline float __int_as_float(int x) { return flame_bits<float>(x); }
static inline float __uint_as_float(unsigned x) { return flame_bits<float>(x); }
static inline long long __double_as_longlong(double x) { return flame_bits<long long>(x); }
static inline double __longlong_as_double(long long x) { return flame_bits<double>(x); }

static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __fsqrt_rn(float a) { return sqrtf(a); }
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline double __dadd_rn(double a, double b) { return a + b; }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline double rsqrt(double x) { return 1.0 / sqrt(x); }
#define __expf expf
#define __logf logf
#define __log2f log2f
#define __sinf sinf
#define __cosf cosf
#define __powf powf
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }

static inline int __mulhi(int a, int b) { return (int)(((long long)a * b) >> 32); }
static inline long long __mul64hi(long long a, long long b) {
  return (long long)(((__int128)a * b) >> 64);
}
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)(((unsigned __int128)a * b) >> 64);
}
static inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
static inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __ffsll(long long x) { return __builtin_ffsll(x); }
static inline unsigned __brev(unsigned x) {
  unsigned made = 0;
  for (int i = 0; i < 32; ++i) made |= (x >> i & 1) << (31 - i);
  return made;
}
static inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
  return by & 31 ? high << (by & 31) | low >> (32 - (by & 31)) : high;
}
static inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
  return by & 31 ? low >> (by & 31) | high << (32 - (by & 31)) : low;
}
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned choice) {
  const unsigned long long both = (unsigned long long)b << 32 | a;
  unsigned made = 0;
  for (int i = 0; i < 4; ++i) made |= (unsigned)(both >> 8 * (choice >> 4 * i & 7) & 255) << 8 * i;
  return made;
}
static inline long long __float2ll_rz(float x) { return (long long)x; }
static inline int __float2int_rn(float x) { return (int)rintf(x); }
static inline int __float2int_rz(float x) { return (int)x; }

#define FLAME_ORDER(T)                                        \
  static inline T min(T a, T b) { return b < a ? b : a; }     \
  static inline T max(T a, T b) { return a < b ? b : a; }
FLAME_ORDER(int)
FLAME_ORDER(unsigned)
FLAME_ORDER(long)
FLAME_ORDER(unsigned long)
FLAME_ORDER(long long)
FLAME_ORDER(unsigned long long)
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline double min(double a, double b) { return fmin(a, b); }
static inline double max(double a, double b) { return fmax(a, b); }

template <typename T> static inline T __ldg(const T* p) { return *p; }
template <typename T> static inline T __ldcs(const T* p) { return *p; }
template <typename T> static inline T __ldcg(const T* p) { return *p; }
template <typename T> static inline T __ldca(const T* p) { return *p; }
template <typename T> static inline void __stcs(T* p, T x) { *p = x; }
template <typename T> static inline void __stcg(T* p, T x) { *p = x; }
template <typename T> static inline void __stwb(T* p, T x) { *p = x; }
static inline void __threadfence() {}
static inline void __threadfence_block() {}
static inline void __threadfence_system() {}
static inline void __nanosleep(unsigned) {}
static inline long long clock64() { return 0; }

// --- half-width floats ---------------------------------------------------------------------------

struct __half {
  unsigned short bits;
  __half() = default;
  __half(float x);
  operator float() const;
};
struct __nv_bfloat16 {
  unsigned short bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float x);
  operator float() const;
};
typedef __half half;
typedef __nv_bfloat16 nv_bfloat16;

static inline float __half2float(__half x) { return (float)flame_bits<_Float16>(x.bits); }
static inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float((unsigned)x.bits << 16); }
static inline __half __float2half_rn(float x) {
  __half made;
  made.bits = flame_bits<unsigned short>((_Float16)x);
  return made;
}
static inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const unsigned whole = __float_as_uint(x);
  __nv_bfloat16 made;
  made.bits = x != x ? 0x7fff : (unsigned short)((whole + 0x7fff + (whole >> 16 & 1)) >> 16);
  return made;
}
static inline __half __float2half(float x) { return __float2half_rn(x); }
static inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }
inline __half::__half(float x) : __half(__float2half_rn(x)) {}
inline __half::operator float() const { return __half2float(*this); }
inline __nv_bfloat16::__nv_bfloat16(float x) : __nv_bfloat16(__float2bfloat16_rn(x)) {}
inline __nv_bfloat16::operator float() const { return __bfloat162float(*this); }

static inline short __half_as_short(__half x) { return (short)x.bits; }
static inline unsigned short __half_as_ushort(__half x) { return x.bits; }
static inline __half __ushort_as_half(unsigned short x) { return flame_bits<__half>(x); }
static inline __half __short_as_half(short x) { return flame_bits<__half>(x); }
static inline short __bfloat16_as_short(__nv_bfloat16 x) { return (short)x.bits; }
static inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
static inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short x) {
  return flame_bits<__nv_bfloat16>(x);
}
static inline __nv_bfloat16 __short_as_bfloat16(short x) { return flame_bits<__nv_bfloat16>(x); }

struct __align__(4) __half2 { __half x, y; };
struct __align__(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
typedef __half2 half2;
typedef __nv_bfloat162 nv_bfloat162;
static inline __half2 __floats2half2_rn(float a, float b) {
  return {__float2half_rn(a), __float2half_rn(b)};
}
static inline __half2 __float22half2_rn(float2 a) { return __floats2half2_rn(a.x, a.y); }
static inline float2 __half22float2(__half2 a) { return {__half2float(a.x), __half2float(a.y)}; }
static inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {__float2bfloat16_rn(a), __float2bfloat16_rn(b)};
}
static inline __nv_bfloat162 __float22bfloat162_rn(float2 a) {
  return __floats2bfloat162_rn(a.x, a.y);
}
static inline float2 __bfloat1622float2(__nv_bfloat162 a) {
  return {__bfloat162float(a.x), __bfloat162float(a.y)};
}

// --- atomics: threads of the emulation take turns, so plain reads and writes are atomic -------------

template <typename T> static inline T atomicAdd(T* p, std::common_type_t<T> x) {
  const T old = *p;
  *p = (T)(old + x);
  return old;
}
static inline __half2 atomicAdd(__half2* p, __half2 x) {
  const __half2 old = *p;
  *p = {__float2half_rn((float)old.x + (float)x.x), __float2half_rn((float)old.y + (float)x.y)};
  return old;
}
static inline __nv_bfloat162 atomicAdd(__nv_bfloat162* p, __nv_bfloat162 x) {
  const __nv_bfloat162 old = *p;
  *p = {__float2bfloat16_rn((float)old.x + (float)x.x),
        __float2bfloat16_rn((float)old.y + (float)x.y)};
  return old;
}
template <typename T> static inline T atomicSub(T* p, std::common_type_t<T> x) {
  const T old = *p;
  *p = (T)(old - x);
  return old;
}
template <typename T> static inline T atomicMax(T* p, std::common_type_t<T> x) {
  const T old = *p;
  if (x > old) *p = x;
  return old;
}
template <typename T> static inline T atomicMin(T* p, std::common_type_t<T> x) {
  const T old = *p;
  if (x < old) *p = x;
  return old;
}
template <typename T> static inline T atomicExch(T* p, std::common_type_t<T> x) {
  const T old = *p;
  *p = x;
  return old;
}
template <typename T>
static inline T atomicCAS(T* p, std::common_type_t<T> compare, std::common_type_t<T> x) {
  const T old = *p;
  if (old == compare) *p = x;
  return old;
}
template <typename T> static inline T atomicAnd(T* p, std::common_type_t<T> x) {
  const T old = *p;
  *p = old & x;
  return old;
}
template <typename T> static inline T atomicOr(T* p, std::common_type_t<T> x) {
  const T old = *p;
  *p = old | x;
  return old;
}
template <typename T> static inline T atomicXor(T* p, std::common_type_t<T> x) {
  const T old = *p;
  *p = old ^ x;
  return old;
}
