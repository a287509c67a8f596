// The inverse transform of `projection` in place: one thread block takes one Hadamard block of `order` (a power of two,
// at most 4096) through shared memory, then the signs and the scale. Sums and products come in the order of hadamard.py,
// so results are the same bit for bit.
//
// Shared memory: `order` floats. blockDim: at most order / 2, a power of two (1 for order 1).
extern "C" __global__ void __launch_bounds__(512) inverse_rotation(u64 values, u64 signs, u32 order, float scale, int wide) {
  float* x = (float*)dynamic_shared();
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
    const u64 k = base + i;
    const u32 minus = (u32)(((const u64*)signs)[k / 64] >> (k % 64)) & 1u;
    own[i] = __uint_as_float(__float_as_uint(x[i] * scale) ^ minus << 31);
  }
}
