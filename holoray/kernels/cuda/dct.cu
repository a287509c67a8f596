// The inverse orthonormal DCT-II of the tiles of a row-major matrix, with the scaling, clipping and cast of finalizing behind
// it: one thread block a tile, both passes in shared memory, so a coefficient is read once and a weight written once. For
// tiles of any side, the smaller ones at the edges included. dct_tiles.cu has the usual ones, with less work.
//
// `pitch` is the length of the matrix's rows, of which `columns` are transformed. Shared memory: 2 * tile * tile floats.
// vertical[j * n + k] and horizontal[...] are a_j cos(pi j (2k + 1) / 2n) for tiles of n rows or columns; edge tiles
// have their own (`vertical_edge`, `horizontal_edge`).
extern "C" __global__ void __launch_bounds__(256) inverse_dct(
    u64 in, u64 out, u64 rows, u64 columns, u64 pitch, u32 tile, u64 vertical, u64 vertical_edge, u64 horizontal,
    u64 horizontal_edge, int kind, int exponent, float limit) {
  float* x = (float*)dynamic_shared();
  float* y = x + tile * tile;
  const u64 across = (columns + tile - 1) / tile, top = blockIdx.x / across * tile, left = blockIdx.x % across * tile;
  const u32 height = rows - top < tile ? (u32)(rows - top) : tile, width = columns - left < tile ? (u32)(columns - left) : tile;
  const float* down = (const float*)(height < tile ? vertical_edge : vertical);
  const float* along = (const float*)(width < tile ? horizontal_edge : horizontal);
  for (u32 i = threadIdx.x; i < height * width; i += blockDim.x)
    x[i] = ((const float*)in)[(top + i / width) * pitch + left + i % width];
  __syncthreads();
  for (u32 i = threadIdx.x; i < height * width; i += blockDim.x) {
    const u32 row = i / width, column = i % width;
    float sum = 0;
    for (u32 j = 0; j < height; ++j) sum += down[j * height + row] * x[j * width + column];
    y[i] = sum;
  }
  __syncthreads();
  for (u32 i = threadIdx.x; i < height * width; i += blockDim.x) {
    const u32 row = i / width, column = i % width;
    float sum = 0;
    for (u32 j = 0; j < width; ++j) sum += y[row * width + j] * along[j * width + column];
    store_weight(out, (top + row) * pitch + left + column, scaled(sum, exponent, limit), kind);
  }
}
