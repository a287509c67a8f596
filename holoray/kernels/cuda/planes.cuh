// What the kernels of `planes` share (codecs/planes_layout.py, ADR 0007 and 0019): runs, streams, words in pairs, records.
//
// One thread block takes one block of 2^16 weights, a warp whole groups of 4,096, a lane the words lane, lane + 32, ... of a
// row. A row is one bit of each weight of a group as a plane is stored: 128 u32; bit j of word w belongs to weight
// j * 256 + 2w, bit j + 16 to the one behind it. So all accesses are 128 bytes a warp, and compacted streams follow the words.
//
// Streams have no positions below a block, hence two walks: the first counts who takes part, group by group. The counts
// must be those of the offset rows before the second walk touches a stream: no byte outside of a section is read or of
// another block written, whatever a section says.
constexpr int GROUP = 4096, ROW = 128, GROUPS = 16, BLOCK = GROUP * GROUPS, RUN_BLOCKS = 8, WARPS = 8, THREADS = 32 * WARPS;
constexpr int TAIL = 5, LOW = 6, TAIL_PLANES = 7, RECORD_BITS = 12, ESCAPE = 15;
constexpr int PLANE = 0, SIGNS = 16, OUTLIER_PLACES = 21, OUTLIER_VALUES = 22, TAIL_BITS = 23, RECORDS = 30, ESCAPES = 31;
constexpr int HALF_PLANE = 32, LOW_BITS = 35, SECTIONS = 36;
constexpr int STREAM_OUTLIERS = 1, STREAM_TAIL = 6, STREAM_RECORDS = 13, STREAM_ESCAPES = 14, STREAMS = 15;
constexpr u32 MINUS = 0x80008000u, MAGNITUDES = 0x7fff7fffu, PAIR = 0x00010001u, HALF_BIAS = 112 << 7;
constexpr u32 ONE_MANTISSA = 59, HALF_MANTISSA = 64;

struct Run {               // planes_launch.RUN; addresses are the device's
  u64 out;                 // the run's weights: u16[count], for F32 u32[count]; 16-byte aligned
  u64 section[SECTIONS];   // raw sections, 16-byte aligned, 16 readable bytes behind each
  u32 length[SECTIONS];    // bytes
  u32 offset[STREAMS][RUN_BLOCKS + 1];
  u32 count;
  int kind, threshold, top, tail_cut, held, layers;  // holds layers 0..held-1, is to hold 0..layers-1
  u32 unused[2];
};
static_assert(sizeof(Run) == 1016, "planes_launch.RUN");

FN int layer_end(const Run& r, int layer) { return layer < 4 ? r.top + 1 + layer : r.top - r.tail_cut; }
FN int stream_of(int layer) { return layer ? layer + 1 : 0; }
FN u32 row_word(const Run& r, int section, u32 g, u32 w) { return __ldg((const u32*)r.section[section] + g * ROW + w); }

FN u32 warp_sum(u32 v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return __reduce_add_sync(ALL, v);
#else
  for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(ALL, v, d);
  return v;
#endif
}
// Takes `own` entries a lane, in the order of lanes, from the place `at` (shared by the warp); returns the lane's first.
FN u32 claim(u32* at, u32 own, int lane) {
  u32 v = own;
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) {
    const u32 y = __shfl_up_sync(ALL, v, d);
    if (lane >= d) v += y;
  }
  const u32 first = *at + v - own;
  __syncwarp();
  if (lane == 31) *at = first + own;
  __syncwarp();
  return first;
}
FN void add_count(u32* at, u32 own, int lane) {
  const u32 sum = warp_sum(own);
  if (!lane) *at += sum;
}

// Bits of x, lowest first, to the set places of m. A bit moves up by the zeros of m below its place: whole nibbles first
// (seven shifts by counted zeros), then pairs inside nibbles, then bits inside pairs. No table, no divergence.
FN u32 shl(u32 x, u32 s) { return __funnelshift_l(0, x, s); }  // by s mod 32
FN u32 pdep(u32 x, u32 m) {
  u32 t = ~m - ((~m >> 1) & 0x55555555u);
  t = (t & 0x33333333u) + ((t >> 2) & 0x33333333u);  // zeros in each nibble
  const u32 lo = t & 0x0f0f0f0fu, even = (lo + ((t >> 4) & 0x0f0f0f0fu)) * 0x01010100u, odd = even + lo;
  u32 r = sel(0xf0u, shl(x, odd), x);
  r = sel(0xf00u, shl(x, even >> 8), r);
  r = sel(0xf000u, shl(x, odd >> 8), r);
  r = sel(0xf0000u, shl(x, even >> 16), r);
  r = sel(0xf00000u, shl(x, odd >> 16), r);
  r = sel(0xf000000u, shl(x, even >> 24), r);
  r = sel(0xf0000000u, shl(x, odd >> 24), r);
  const u32 one = (m ^ (m >> 1)) & 0x11111111u, two = ~(m | (m >> 1)) & 0x11111111u;  // zeros in the low pair of a nibble
  r = sel(one * 12, r << 1, r);
  r = sel(two * 12, r << 2, r);
  return sel(~(m << 1) & 0xaaaaaaaau, r << 1, r) & m;
}
FN u32 bits_at(const Run& r, int section, u32 bit) {  // 32 bits
  const u32* p = (const u32*)r.section[section] + (bit >> 5);
  return __funnelshift_r(__ldg(p), __ldg(p + 1), bit);
}
FN u32 deposit(const Run& r, int section, u32* at, u32 mask, int lane) {
  return pdep(bits_at(r, section, claim(at, __popc(mask), lane)), mask);
}

// ---- words, in pairs
FN u32 halves(u32 flags) { return prmt(flags, 0, 0xbb99); }  // bits 31 and 15 to 16 bits each
FN u32 nonzero(u32 m) { return (m + MAGNITUDES) & MINUS; }   // of magnitudes
FN u32 reached(u32 m, u32 limit) { return ((m | MINUS) - limit * PAIR) & MINUS; }
FN u32 halves_of_words(u32 x) {  // float16 bits of a pair (normal numbers and zeros)
  const u32 m = x & MAGNITUDES;  // nothing is taken from a zero: that would borrow from its neighbour
  return (m - (HALF_BIAS * PAIR & halves(nonzero(m)))) << 3 | (x & MINUS);
}
FN u32 words_of_halves(u32 x) {
  const u32 m = x & MAGNITUDES;
  return (((m >> 3 & 0x0fff0fffu) + HALF_BIAS * PAIR) & halves(nonzero(m))) | (x & MINUS);
}

struct Place {  // pairs j * 256 + 2w + {0, 1} of a group that begins with weight `first` of the run
  const Run& r;
  u32 first, room;  // room: weights from the lane's first one on
  FN Place(const Run& r, u32 g, u32 w) : r(r), first(g * GROUP + 2 * w), room(r.count > first ? r.count - first : 0) {}
  FN u32 inside() const {  // bits of the weights that exist
    const u32 a = (room + 255) >> 8, b = (room + 254) >> 8;
    return ((1u << (a < 16 ? a : 16)) - 1) | ((1u << (b < 16 ? b : 16)) - 1) << 16;
  }
  // The words of pair j, zeros where there are no weights; for F16 `lows` takes the mantissa bits that words lack.
  FN u32 load(int j, u32& lows) const {
    const u32 k = first + j * 256;
    if (j * 256 >= room) return lows = 0;
    const bool two = j * 256 + 1 < room;
    if (r.kind == F32) {
      const u32* at = (const u32*)r.out + k;
      lows = 0;
      return at[0] >> 16 | (two ? at[1] & 0xffff0000u : 0);
    }
    const u16* at = (const u16*)r.out + k;
    const u32 x = two ? *(const u32*)at : *at;
    lows = r.kind == F16 ? x & 7 * PAIR : 0;
    return r.kind == F16 ? words_of_halves(x) : x;
  }
  FN void store(int j, u32 words, u32 lows) const {
    const u32 k = first + j * 256;
    if (j * 256 >= room) return;
    const bool two = j * 256 + 1 < room;
    if (r.kind == F32) {
      const u32 low = r.layers > LOW ? __ldg((const u32*)((const u16*)r.section[LOW_BITS] + k)) : 0;
      u32* at = (u32*)r.out + k;
      if (two)
        *(uint2*)at = make_uint2(words << 16 | (low & 0xffffu), (words & 0xffff0000u) | low >> 16);
      else
        *at = words << 16 | (low & 0xffffu);
      return;
    }
    u16* at = (u16*)r.out + k;
    const u32 x = r.kind == F16 ? halves_of_words(words) | lows : words;
    if (two)
      *(u32*)at = x;
    else
      *at = (u16)x;
  }
};
FN void store_one(const Run& r, u32 k, u32 bits) {  // the upper 16 bits of a weight, raw
  if (r.kind == F32)
    ((u32*)r.out)[k] = bits << 16 | (r.layers > LOW ? ((const u16*)r.section[LOW_BITS])[k] : 0u);
  else
    ((u16*)r.out)[k] = (u16)bits;
}

// ---- the frame of every kernel, of which `blocks` thread blocks work on each run: the run, the counts of its streams in shared memory, and what is found wrong
struct Frame {
  Run run;
  u32 count[STREAMS + 1][GROUPS];  // how many take part of each group; then where the group begins in its stream
  u32 bad;                         // a stream + 1
};
#define PROLOGUE(concerned)                                                                             \
  __shared__ Frame f;                                                                                   \
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, block = blockIdx.x % blocks;              \
  u32* const failed = bad + blockIdx.x / blocks;                                                        \
  if (threadIdx.x < sizeof(Run) / 4)                                                                    \
    ((u32*)&f.run)[threadIdx.x] = ((const u32*)(runs + blockIdx.x / blocks))[threadIdx.x];              \
  for (int i = threadIdx.x; i < (STREAMS + 1) * GROUPS; i += THREADS) (&f.count[0][0])[i] = 0;          \
  if (!threadIdx.x) f.bad = *failed;                                                                    \
  __syncthreads();                                                                                      \
  const Run& r = f.run;                                                                                 \
  const bool skip = f.bad || !(concerned) || (u32)block * BLOCK >= r.count;                             \
  __syncthreads(); /* nobody writes f.bad before all have read it */                                    \
  if (skip) return;                                                                                     \
  const u32 left = r.count - block * BLOCK;                                                             \
  const int groups = left >= BLOCK ? GROUPS : (int)((left + GROUP - 1) / GROUP), base = block * GROUPS; \
  (void)base, (void)groups, (void)lane, (void)warp;

FN u32 bytes_of(int stream, u32 entries) {
  return stream == STREAM_RECORDS ? (entries * RECORD_BITS + 7) / 8
         : stream == STREAM_OUTLIERS || stream == STREAM_ESCAPES ? 2 * entries : (entries + 7) / 8;
}
FN int section_of(int stream) {
  return stream == STREAM_OUTLIERS ? OUTLIER_VALUES : stream == STREAM_RECORDS ? RECORDS : stream == STREAM_ESCAPES ? ESCAPES
         : stream >= STREAM_TAIL ? TAIL_BITS + stream - STREAM_TAIL : SIGNS + (stream ? stream - 1 : 0);
}
// Whether the block's part of a stream has `entries`, lies in its section, and ends it where the run ends.
FN bool agrees(const Run& r, int stream, int block, u32 entries) {
  const u32 start = r.offset[stream][block], end = r.offset[stream][block + 1], length = r.length[section_of(stream)];
  const bool last = (u32)(block + 1) * BLOCK >= r.count;
  return start <= end && end <= r.count && end - start == entries && bytes_of(stream, end) <= length &&
         (block || !start) && (!last || bytes_of(stream, end) == length);
}
// Turns the counts of streams first..last into where groups begin; `records` (if not null) keeps those of the records.
// False, for all threads, if one does not agree.
FN bool settle(Frame& f, int block, int first, int last, u32* records) {
  __syncthreads();
  const int s = threadIdx.x >> 4, g = threadIdx.x & 15;
  const u32 own = f.count[s][g];
  u32 v = own;
#pragma unroll
  for (int d = 1; d < 16; d <<= 1) {
    const u32 y = __shfl_up_sync(ALL, v, d);
    if (g >= d) v += y;
  }
  if (records && s == STREAM_RECORDS) records[g] = own;
  if (s >= first && s <= last && s != STREAM_OUTLIERS) {
    if (g == 15 && !agrees(f.run, s, block, v)) atomicMax(&f.bad, s + 1u);
    f.count[s][g] = f.run.offset[s][block] + v - own;
  }
  __syncthreads();
  return !f.bad;
}
#define GIVE_UP                                         \
  do {                                                  \
    if (!threadIdx.x) atomicMax(failed, f.bad);         \
    return;                                             \
  } while (0)

// ---- outliers: places checked before they are used, marked in `mask` (a row a group) if there is one
FN bool check_outliers(Frame& f, int block, u32* mask) {
  const Run& r = f.run;
  const u32 first = r.offset[STREAM_OUTLIERS][block], end = r.offset[STREAM_OUTLIERS][block + 1];
  if (!agrees(r, STREAM_OUTLIERS, block, end - first) || r.length[OUTLIER_PLACES] != r.length[OUTLIER_VALUES]) {
    if (!threadIdx.x) f.bad = STREAM_OUTLIERS + 1;
    __syncthreads();
    return false;
  }
  if (mask)
    for (int i = threadIdx.x; i < GROUPS * ROW; i += THREADS) mask[i] = 0;
  __syncthreads();
  const u16* places = (const u16*)r.section[OUTLIER_PLACES];
  for (u32 q = first + threadIdx.x; q < end; q += THREADS) {
    const u32 k = places[q];
    if (k >= r.count - block * BLOCK || (q > first && places[q - 1] >> 12 > k >> 12)) atomicMax(&f.bad, STREAM_OUTLIERS + 1u);
    if (mask) atomicOr(&mask[(k >> 12) * ROW + ((k & 255) >> 1)], 1u << ((k >> 8 & 15) + 16 * (k & 1)));
  }
  __syncthreads();
  return !f.bad;
}
FN void patch_outliers(const Run& r, int block) {
  __syncthreads();
  const u16 *places = (const u16*)r.section[OUTLIER_PLACES], *values = (const u16*)r.section[OUTLIER_VALUES];
  for (u32 q = r.offset[STREAM_OUTLIERS][block] + threadIdx.x; q < r.offset[STREAM_OUTLIERS][block + 1]; q += THREADS)
    store_one(r, block * BLOCK + places[q], values[q]);
}

// ---- records of the weights below the tail cut
FN u32 record(const Run& r, u32 n) { return bits_at(r, RECORDS, n * RECORD_BITS); }
FN bool settle_escapes(Frame& f, int block, int groups, const u32* sizes) {
  const int lane = threadIdx.x & 31;
  for (int g = threadIdx.x >> 5; g < groups; g += WARPS) {
    u32 n = 0;
    for (u32 q = lane; q < sizes[g]; q += 32) n += (record(f.run, f.count[STREAM_RECORDS][g] + q) & 15) == ESCAPE;
    add_count(&f.count[STREAM_ESCAPES][g], n, lane);
  }
  return settle(f, block, STREAM_ESCAPES, STREAM_ESCAPES, nullptr);
}
// Writes the lane's weights in `below`; `lows` are the rows of the float16 bits that words lack.
FN void write_records(Frame& f, int g, const Place& place, u32 below, const u32 (&lows)[3], int lane) {
  const Run& r = f.run;
  const u32 first = claim(&f.count[STREAM_RECORDS][g], __popc(below), lane);
  u32 escapes = 0, n = first;
  for (u32 m = below; m; m &= m - 1) escapes += (record(r, n++) & 15) == ESCAPE;
  u32 escape = claim(&f.count[STREAM_ESCAPES][g], escapes, lane);
  n = first;
  for (u32 m = below; m; m &= m - 1) {
    const int b = __ffs((int)m) - 1;
    const u32 x = record(r, n++), k = place.first + (b & 15) * 256 + (b >> 4);
    if ((x & 15) == ESCAPE) {
      store_one(r, k, ((const u16*)r.section[ESCAPES])[escape++]);
      continue;
    }
    u32 m16 = ((u32)(r.threshold + r.tail_cut - 1 - (int)(x & 15)) << 7 | (x >> 4 & 127)) & 0x7fff;
    if (r.kind == F16) m16 = ((m16 - HALF_BIAS) << 3 & 0x7fff) | (lows[0] >> b & 1) << 2 | (lows[1] >> b & 1) << 1 | (lows[2] >> b & 1);
    store_one(r, k, (x >> 11 & 1) << 15 | m16);
  }
}
FN void load_lows(const Run& r, u32 g, u32 w, u32 (&rows)[3]) {
#pragma unroll
  for (int p = 0; p < 3; ++p) rows[p] = r.kind == F16 ? row_word(r, HALF_PLANE + p, g, w) : 0;
}
FN u32 low_bits(const u32 (&rows)[3], int j) {
  return (rows[0] >> j & PAIR) << 2 | (rows[1] >> j & PAIR) << 1 | (rows[2] >> j & PAIR);
}

