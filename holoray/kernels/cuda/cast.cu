// Finalizing: float32 times a power of two, clipped, to F32, F16 or BF16. Grid-stride over groups of eight.
extern "C" __global__ void __launch_bounds__(256) cast_weights(
    u64 in, u64 out, u64 count, int kind, int exponent, float limit) {
  const u64 step = (u64)gridDim.x * blockDim.x, first = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  for (u64 e = first; e < count / 8; e += step) {
    const float4 a = ((const float4*)in)[2 * e], b = ((const float4*)in)[2 * e + 1];
    float x[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = scaled(x[i], exponent, limit);
    store_eight(out, 8 * e, x, kind);
  }
  for (u64 k = count / 8 * 8 + first; k < count; k += step)
    store_weight(out, k, scaled(((const float*)in)[k], exponent, limit), kind);
}
