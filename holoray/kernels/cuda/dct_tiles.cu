// The inverse orthonormal DCT-II of whole tiles of 8 to 64, with the scaling, clipping and cast of finalizing behind it.
//
// A thread transforms a column, then a row, in registers, by the even-odd decomposition: the even coefficients of N are an
// inverse DCT of N / 2, the odd ones a product with a matrix of half the side, whose cosines are constants of the program.
FN constexpr double cosine(double x) {  // |x| <= pi: the Taylor series, whose terms are below 1e-17 from x^30 on
  double term = 1, sum = 0;
  for (int n = 0; n < 30; n += 2) {
    sum += term;
    term *= -x * x / ((n + 1) * (n + 2));
  }
  return sum;
}

template <int N> struct OddCosines {  // cos(pi (2m + 1) (2k + 1) / 2N)
  float at[N / 2][N / 2];
  FN constexpr OddCosines() : at() {
    for (int m = 0; m < N / 2; ++m)
      for (int k = 0; k < N / 2; ++k) {
        const int turn = (2 * m + 1) * (2 * k + 1) % (4 * N) - 2 * N;  // of 4N, after half a turn, which changes the sign
        at[m][k] = (float)-cosine(3.14159265358979323846 / (2 * N) * turn);
      }
  }
};

template <int N> FN void inverse(float (&x)[N]) {  // x_k = sum_j x_j cos(pi j (2k + 1) / 2N)
  if constexpr (N > 1) {
    constexpr OddCosines<N> cosines;
    float even[N / 2], odd[N / 2];
#pragma unroll
    for (int m = 0; m < N / 2; ++m) even[m] = x[2 * m];
#pragma unroll
    for (int k = 0; k < N / 2; ++k) {
      odd[k] = 0;
#pragma unroll
      for (int m = 0; m < N / 2; ++m) odd[k] += cosines.at[m][k] * x[2 * m + 1];
    }
    inverse(even);
#pragma unroll
    for (int k = 0; k < N / 2; ++k) {
      x[k] = even[k] + odd[k];
      x[N - 1 - k] = even[k] - odd[k];
    }
  }
}

// A block takes WIDE columns of one row of tiles, a thread a column. `columns` holds whole tiles. Shared memory: N rows of
// WIDE + 1 floats, so that the numbers of neighbouring rows lie in neighbouring banks.
constexpr u32 WIDE = 128;
template <int N> FN void whole_tiles(u64 in, u64 out, u64 columns, u64 pitch, int kind, int exponent, float limit) {
  constexpr float ROOT_HALF = 0.70710678118654752f;  // the scale of coefficient 0 beside that of the others, sqrt(2 / N)
  float* y = (float*)dynamic_shared();
  const u64 groups = (columns + WIDE - 1) / WIDE, top = blockIdx.x / groups * N, left = blockIdx.x % groups * WIDE;
  const u32 t = threadIdx.x;
  const bool live = left + t < columns;
  float* own = y + t % N * (WIDE + 1) + t / N * N;
  float x[N];
  if (live) {
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = ((const float*)in)[(top + j) * pitch + left + t];
    x[0] *= ROOT_HALF;
    inverse(x);
#pragma unroll
    for (int j = 0; j < N; ++j) y[j * (WIDE + 1) + t] = x[j];
  }
  __syncthreads();
  if (live) {
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = own[j];
    x[0] *= ROOT_HALF;
    inverse(x);
#pragma unroll
    for (int j = 0; j < N; ++j) own[j] = x[j] * (2.0f / N);
  }
  __syncthreads();
  if (live)
    for (u32 j = 0; j < N; ++j)
      store_weight(out, (top + j) * pitch + left + t, scaled(y[j * (WIDE + 1) + t], exponent, limit), kind);
}

extern "C" __global__ void __launch_bounds__(128) inverse_dct_8(
    u64 in, u64 out, u64 columns, u64 pitch, int kind, int exponent, float limit) {
  whole_tiles<8>(in, out, columns, pitch, kind, exponent, limit);
}
extern "C" __global__ void __launch_bounds__(128) inverse_dct_16(
    u64 in, u64 out, u64 columns, u64 pitch, int kind, int exponent, float limit) {
  whole_tiles<16>(in, out, columns, pitch, kind, exponent, limit);
}
extern "C" __global__ void __launch_bounds__(128) inverse_dct_32(
    u64 in, u64 out, u64 columns, u64 pitch, int kind, int exponent, float limit) {
  whole_tiles<32>(in, out, columns, pitch, kind, exponent, limit);
}
extern "C" __global__ void __launch_bounds__(128) inverse_dct_64(
    u64 in, u64 out, u64 columns, u64 pitch, int kind, int exponent, float limit) {
  whole_tiles<64>(in, out, columns, pitch, kind, exponent, limit);
}
