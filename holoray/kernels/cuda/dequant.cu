// Quantised weights to floats, from the integers as GPTQ, AWQ and int8 layers pack them (formats/quantised.py):
// out[row, column] = (q - zero) * scale. The difference is exact and the product rounded once to float32, then to the
// dtype of the output; as the twin in dequant.py, operation for operation.
//
// Packed layers lie inputs first and weights outputs first. A block reads a tile of words, 16 bytes a thread, into
// shared memory, and each thread takes from there eight neighbours of an output row: one 16-byte store.
enum Method : int { GPTQ, AWQ, INT8 };
constexpr u32 TILE = 8192, EIGHTS = TILE / 8, THREADS = 256;  // weights, and their eights, of one tile

// A layer without its integers. `order` is the group of each input, 0 where `group` neighbours share one.
struct Layer {
  u64 scales, zeros, order, out;
  u32 rows, columns, group, groups, bits, offset;
  int scale_kind, kind;
};

FN float scale_of(const Layer& x, u64 i) {
  if (x.scale_kind == F32) return ((const float*)x.scales)[i];
  const u16 bits = ((const u16*)x.scales)[i];
  return x.scale_kind == F16 ? half_value(bits) : __uint_as_float((u32)bits << 16);
}

// Which nibble of a word of AWQ holds output n of its eight.
FN u32 awq_place(u32 n) { return n & 1 ? 4 + n / 2 : n / 2; }

template <int METHOD> FN u64 scale_place(const Layer& x, u32 g, u32 row) {
  return METHOD == INT8 ? (u64)row * x.groups + g : (u64)g * x.rows + row;
}

template <int METHOD> FN int zero_of(const Layer& x, u32 g, u32 row) {
  if (METHOD == INT8) return x.zeros ? ((const signed char*)x.zeros)[scale_place<INT8>(x, g, row)] : 0;
  const u32 per_word = 32 / x.bits, place = METHOD == AWQ ? awq_place(row & 7) : row % per_word;
  const u32 word = ((const u32*)x.zeros)[((u64)g * x.rows + row) / per_word];
  return (int)(((word >> x.bits * place) + x.offset) & ((1u << x.bits) - 1));
}

// Scale and store the integers of eight neighbours of a row, of which the last may lie beyond its end.
template <int METHOD> FN void finish_eight(const Layer& x, const int (&q)[8], u32 row, u32 column) {
  float weights[8];
  if (!x.order && x.group % 8 == 0) {
    const u32 g = column / x.group;
    const int zero = zero_of<METHOD>(x, g, row);
    const float scale = scale_of(x, scale_place<METHOD>(x, g, row));
#pragma unroll
    for (int i = 0; i < 8; ++i) weights[i] = (float)(q[i] - zero) * scale;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const u32 input = column + i < x.columns ? column + i : x.columns - 1;
      const u32 g = x.order ? ((const u32*)x.order)[input] : input / x.group;
      weights[i] = (float)(q[i] - zero_of<METHOD>(x, g, row)) * scale_of(x, scale_place<METHOD>(x, g, row));
    }
  }
  const u64 first = (u64)row * x.columns + column;
  if (x.columns % 8 == 0) return store_eight(x.out, first, weights, x.kind);
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (column + i < x.columns) store_weight(x.out, first + i, weights[i], x.kind);
}

#define LAYER_ARGUMENTS                                                                                          \
  u64 q, u64 scales, u64 zeros, u64 order, u64 out, u32 rows, u32 columns, u32 group, u32 groups, u32 bits,      \
      u32 offset, int scale_kind, int kind
#define LAYER Layer{scales, zeros, order, out, rows, columns, group, groups, bits, offset, scale_kind, kind}

// Tiles of 64 outputs x 128 inputs. q: a word is 32 / bits inputs of one output; neighbouring words are outputs.
extern "C" __global__ void __launch_bounds__(THREADS) dequantise_gptq(LAYER_ARGUMENTS) {
  constexpr u32 OUTPUTS = 64, INPUTS = TILE / OUTPUTS, PITCH = OUTPUTS + 2;
  __shared__ u32 tile[INPUTS / 4 * PITCH];
  const Layer layer = LAYER;
  const u32 lines = INPUTS * bits / 32, all_lines = columns / (32 / bits), across = (columns + INPUTS - 1) / INPUTS;
  const u64 tiles = (u64)across * ((rows + OUTPUTS - 1) / OUTPUTS);
  for (u64 t = blockIdx.x; t < tiles; t += gridDim.x) {
    const u32 first_row = (u32)(t / across) * OUTPUTS, first_column = (u32)(t % across) * INPUTS;
    const u32 first_line = first_column / 32 * bits;
    for (u32 k = threadIdx.x; k < lines * (OUTPUTS / 4); k += THREADS) {
      const u32 line = k / (OUTPUTS / 4), output = k % (OUTPUTS / 4) * 4;
      uint4 words = make_uint4(0, 0, 0, 0);
      if (first_line + line < all_lines && first_row + output < rows)  // outputs are a multiple of four
        words = *(const uint4*)((const u32*)q + (u64)(first_line + line) * rows + first_row + output);
      u32* to = tile + line * PITCH + output;
      to[0] = words.x, to[1] = words.y, to[2] = words.z, to[3] = words.w;
    }
    __syncthreads();
    for (u32 e = threadIdx.x; e < EIGHTS; e += THREADS) {
      const u32 output = e / (INPUTS / 8), part = e % (INPUTS / 8);
      const u32 row = first_row + output, column = first_column + 8 * part;
      if (row >= rows || column >= columns) continue;
      const u32* word = tile + part * bits / 4 * PITCH + output;
      const u32 low = bits == 2 ? *word >> 16 * (part & 1) : *word, high = bits == 8 ? word[PITCH] : 0;
      int values[8];
#pragma unroll
      for (int i = 0; i < 8; ++i)
        values[i] = bits == 8 ? (i < 4 ? low : high) >> 8 * (i & 3) & 255 : low >> bits * i & ((1u << bits) - 1);
      finish_eight<GPTQ>(layer, values, row, column);
    }
    __syncthreads();
  }
}

// Tiles of 128 outputs x 64 inputs. q: a word is eight outputs of one input; neighbouring words are outputs.
extern "C" __global__ void __launch_bounds__(THREADS) dequantise_awq(LAYER_ARGUMENTS) {
  constexpr u32 OUTPUTS = 128, INPUTS = TILE / OUTPUTS, WORDS = OUTPUTS / 8;
  __shared__ u32 tile[INPUTS * WORDS];  // turned by one word each eight lines, which a warp reads together
  const Layer layer = LAYER;
  const u32 line_words = rows / 8, across = (columns + INPUTS - 1) / INPUTS;
  const u64 tiles = (u64)across * ((rows + OUTPUTS - 1) / OUTPUTS);
  for (u64 t = blockIdx.x; t < tiles; t += gridDim.x) {
    const u32 first_row = (u32)(t / across) * OUTPUTS, first_column = (u32)(t % across) * INPUTS;
    for (u32 k = threadIdx.x; k < INPUTS * (WORDS / 4); k += THREADS) {
      const u32 line = k / (WORDS / 4), word = k % (WORDS / 4) * 4, at = first_row / 8 + word;
      u32 words[4] = {0, 0, 0, 0};
      if (first_column + line < columns) {
        const u32* from = (const u32*)q + (u64)(first_column + line) * line_words + at;
        if (line_words % 4 == 0 && at < line_words) {
          const uint4 four = *(const uint4*)from;
          words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
        } else {
#pragma unroll
          for (u32 i = 0; i < 4; ++i)
            if (at + i < line_words) words[i] = from[i];
        }
      }
#pragma unroll
      for (u32 i = 0; i < 4; ++i) tile[line * WORDS + (word + i + line / 8) % WORDS] = words[i];
    }
    __syncthreads();
    for (u32 e = threadIdx.x; e < EIGHTS; e += THREADS) {
      const u32 output = e / (INPUTS / 8), part = e % (INPUTS / 8);
      const u32 row = first_row + output, column = first_column + 8 * part;
      if (row >= rows || column >= columns) continue;
      const u32* word = tile + 8 * part * WORDS + (output / 8 + part) % WORDS;
      const u32 shift = 4 * awq_place(output & 7);
      int values[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] = word[i * WORDS] >> shift & 15;
      finish_eight<AWQ>(layer, values, row, column);
    }
    __syncthreads();
  }
}

// q: int8 rows of inputs, as the weights.
extern "C" __global__ void __launch_bounds__(THREADS) dequantise_int8(LAYER_ARGUMENTS) {
  const Layer layer = LAYER;
  const u32 across = (columns + 7) / 8;
  const u64 step = (u64)gridDim.x * THREADS;
  for (u64 e = (u64)blockIdx.x * THREADS + threadIdx.x; e < (u64)rows * across; e += step) {
    const u32 row = (u32)(e / across), column = (u32)(e % across) * 8;
    const u64 first = (u64)row * columns + column;
    int values[8];
    if (columns % 8 == 0) {
      const uint2 both = *(const uint2*)((const u8*)q + first);
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] = (signed char)((i < 4 ? both.x : both.y) >> 8 * (i & 3));
    } else {
#pragma unroll
      for (u32 i = 0; i < 8; ++i) values[i] = column + i < columns ? ((const signed char*)q)[first + i] : 0;
    }
    finish_eight<INT8>(layer, values, row, column);
  }
}
