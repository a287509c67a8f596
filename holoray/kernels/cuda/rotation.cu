// The inverse transform of `projection` in place: one thread block takes one Hadamard block of `order` (a power of two,
// at most 4096) through shared memory, then the signs and the scale. Sums and products come in the order of hadamard.py,
// so results are the same bit for bit. The signs of 64 numbers are one number of a sequence, which the block computes.
//
// Shared memory: `order` floats and, at the next multiple of 8 bytes, a u64 for every 64 of them, at least one.
// blockDim: at most order / 2, a power of two (1 for order 1). An order below 64 comes in a single block.
FN u64 splitmix64(u64 seed, u64 number) {  // Steele, Lea, Flood: Fast splittable pseudorandom number generators (2014)
  u64 z = seed + (number + 1) * 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

extern "C" __global__ void __launch_bounds__(512) inverse_rotation(u64 values, u64 seed, u32 order, float scale, int wide) {
  float* x = (float*)dynamic_shared();
  u64* signs = (u64*)(x + (order + 1) / 2 * 2);
  const u64 words = (u64)blockIdx.x * order / 64;
  for (u32 i = threadIdx.x; i < (order + 63) / 64; i += blockDim.x) signs[i] = splitmix64(seed, words + i);
  const u64 base = (u64)blockIdx.x * order;
  float* own = (float*)values + base;
  if (wide) {  // `values` at a multiple of 16 bytes, and whole fours
    for (u32 i = threadIdx.x; i < order / 4; i += blockDim.x) ((float4*)x)[i] = ((const float4*)own)[i];
  } else {
    for (u32 i = threadIdx.x; i < order; i += blockDim.x) x[i] = own[i];
  }
  for (u32 half = 1; half < order; half *= 2) {
    __syncthreads();
    for (u32 i = threadIdx.x; i < order / 2; i += blockDim.x) {
      const u32 a = (i & ~(half - 1)) * 2 + (i & (half - 1)), b = a + half;
      const float first = x[a], second = x[b];
      x[a] = first + second;
      x[b] = first - second;
    }
  }
  __syncthreads();
  for (u32 i = threadIdx.x; i < order; i += blockDim.x) {
    const u32 minus = (u32)(signs[i / 64] >> (i % 64)) & 1u;
    own[i] = __uint_as_float(__float_as_uint(x[i] * scale) ^ minus << 31);
  }
}
