// What every kernel file may use. C++17, compute capability 7.5 and later; no header, so that NVRTC needs no include path.
//
// `compile.py` puts this file in front of each kernel file. The tests compile the very same text as C++ for the CPU;
// what a CPU lacks (also the few names in the first block below) is then defined by their own header.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifdef __CUDACC__
#define FN __device__ __forceinline__
FN void* dynamic_shared() {
  extern __shared__ uint4 pool[];
  return pool;
}
// Four bytes chosen from a (0 to 3) and b (4 to 7) by the nibbles of `selector`; a nibble plus 8 spreads the byte's sign.
FN u32 prmt(u32 a, u32 b, u32 selector) {
  u32 r;
  asm("prmt.b32 %0,%1,%2,%3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}
FN u16 half_bits(float x) {  // nearest even
  u16 r;
  asm("cvt.rn.f16.f32 %0,%1;" : "=h"(r) : "f"(x));
  return r;
}
FN float half_value(u16 bits) {
  float r;
  asm("cvt.f32.f16 %0,%1;" : "=f"(r) : "h"(bits));
  return r;
}
#endif

constexpr u32 ALL = ~0u;
enum Kind : int { BF16 = 0, F16 = 1, F32 = 2 };  // of weights; the numbers of planes_groups.KINDS

FN u32 sel(u32 mask, u32 a, u32 b) { return (a & mask) | (b & ~mask); }

// The upper half of a float, rounded to nearest even; a NaN becomes the quiet one of its sign.
FN u16 bfloat_bits(float x) {
  const u32 bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (u16)((bits >> 16 & 0x8000u) | 0x7fc0u);
  return (u16)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// Stores of one weight, and of eight neighbours at a multiple of eight (16-byte accesses), in any of the three dtypes.
FN void store_weight(u64 out, u64 k, float x, int kind) {
  if (kind == F32)
    ((float*)out)[k] = x;
  else
    ((u16*)out)[k] = kind == F16 ? half_bits(x) : bfloat_bits(x);
}
FN void store_eight(u64 out, u64 k, const float (&x)[8], int kind) {
  if (kind == F32) {
    float4* to = (float4*)((float*)out + k);
    to[0] = make_float4(x[0], x[1], x[2], x[3]);
    to[1] = make_float4(x[4], x[5], x[6], x[7]);
    return;
  }
  u32 pair[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    pair[i] = kind == F16 ? half_bits(x[2 * i]) | (u32)half_bits(x[2 * i + 1]) << 16
                          : bfloat_bits(x[2 * i]) | (u32)bfloat_bits(x[2 * i + 1]) << 16;
  *(uint4*)((u16*)out + k) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
}

// x * 2^exponent, rounded once, and kept within +-limit (a NaN stays one).
FN float scaled(float x, int exponent, float limit) {
  const float y = exponent ? ldexpf(x, exponent) : x;
  return y > limit ? limit : y < -limit ? -limit : y;
}
