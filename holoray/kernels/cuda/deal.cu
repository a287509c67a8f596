// Dealt coefficients back to their places (codecs/dealing.py), before an inverse transform.
//
// `shares` holds the share of fragment f from number starts[f] on, as it arrived. In a strip, the coefficients of fragment f
// stand at (offsets[strip] + f) mod `fragments` and at every `fragments`-th place behind: a place and its strip tell the
// fragment, and which of its numbers it is. A block takes whole strips, so that divisions are of 32 bits.
extern "C" __global__ void __launch_bounds__(256) collect_shares(
    u64 shares, u64 starts, u64 offsets, u64 raster, u64 size, u32 strip, u32 fragments) {
  const u32 each = strip / fragments;
  for (u64 s = blockIdx.x; s * strip < size; s += gridDim.x) {
    const u32 offset = ((const u16*)offsets)[s];
    const u32 count = size - s * strip < strip ? (u32)(size - s * strip) : strip;
    for (u32 i = threadIdx.x; i < count; i += blockDim.x) {
      const u32 turn = i / fragments, first = i - turn * fragments;
      const u32 fragment = first >= offset ? first - offset : first + fragments - offset;
      ((float*)raster)[s * strip + i] = ((const float*)shares)[((const u64*)starts)[fragment] + s * each + turn];
    }
  }
}

// Essential coefficients to their places: positions of 32 bits or (wide) 64.
extern "C" __global__ void __launch_bounds__(256) put_numbers(u64 positions, u64 values, u64 raster, u64 count, int wide) {
  for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (u64)gridDim.x * blockDim.x) {
    const u64 place = wide ? ((const u64*)positions)[i] : ((const u32*)positions)[i];
    ((float*)raster)[place] = ((const float*)values)[i];
  }
}
