// Quantised weights to floats: (q - zero) * scale, one scale and one zero for each `group` neighbours of a row.
//
// q is int8 (bits 8), or two unsigned 4-bit numbers a byte, the lower nibble first (bits 4; rows are whole bytes: with an
// odd number of columns the last nibble is unused). The difference is exact and the product rounded once to float32,
// then to the dtype of the output.
FN int quantum(u64 q, u64 row, u32 column, u32 columns, int bits) {
  if (bits == 8) return ((const signed char*)q)[row * columns + column];
  const u8 byte = ((const u8*)q)[row * ((columns + 1) / 2) + column / 2];
  return column & 1 ? byte >> 4 : byte & 15;
}

extern "C" __global__ void __launch_bounds__(256) dequantise(
    u64 q, u64 scales, u64 zeros, u64 out, u64 rows, u32 columns, u32 group, int bits, int kind) {
  const u32 eights = (columns + 7) / 8, groups = (columns + group - 1) / group;
  // Eight neighbours take one load and one 16-byte store where rows begin at multiples of eight and groups hold whole ones.
  const bool wide = columns % 8 == 0 && group % 8 == 0;
  const u64 step = (u64)gridDim.x * blockDim.x;
  for (u64 e = (u64)blockIdx.x * blockDim.x + threadIdx.x; e < rows * eights; e += step) {
    const u64 row = e / eights;
    const u32 column = (u32)(e - row * eights) * 8;
    const float* scale = (const float*)scales + row * groups;
    const signed char* zero = (const signed char*)zeros + row * groups;
    if (wide) {
      const u32 g = column / group;
      u32 low, high = 0;
      if (bits == 8) {
        const uint2 both = *(const uint2*)((const u8*)q + row * columns + column);
        low = both.x;
        high = both.y;
      } else {
        low = *(const u32*)((const u8*)q + (row * columns + column) / 2);
      }
      float x[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int value = bits == 8 ? (signed char)((i < 4 ? low : high) >> 8 * (i & 3)) : (int)(low >> 4 * i & 15);
        x[i] = (float)(value - zero[g]) * scale[g];
      }
      store_eight(out, row * columns + column, x, kind);
      continue;
    }
    for (u32 c = column; c < columns && c < column + 8; ++c)
      store_weight(out, row * columns + c, (float)(quantum(q, row, c, columns, bits) - zero[c / group]) * scale[c / group], kind);
  }
}
