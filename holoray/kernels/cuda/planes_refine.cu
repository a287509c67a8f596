// `planes` in place: further layers, the tail, the low bits.
//
// A resident word carries its own state: its lowest set bit, the fill, marks how far it is known.
FN u32 lowest_bits(u32 m) {  // of both magnitudes; 0 for 0, which must not carry to its neighbour
  const u32 some = halves(nonzero(m)), x = m | (~some & PAIR);
  return x & (~x + PAIR) & some;
}
struct Fill {  // words of which nothing but a leading digit is known read 1.4609375: back to digits and fill
  u32 lone, toggled;
  FN Fill(int exponent) : lone(((u32)exponent << 7 | ONE_MANTISSA) * PAIR), toggled((ONE_MANTISSA ^ HALF_MANTISSA) * PAIR) {}
  FN u32 known(u32 m) const { return m ^ (toggled & ~halves((m ^ lone) + MAGNITUDES)); }
};
// One digit more at `exponent`, an exponent field: planes_words.refine for a pair. `digit` and `sign` are 0 or all ones.
FN u32 refined(u32 word, u32 digit, u32 sign, int exponent, u32 limit) {
  const u32 m = word & MAGNITUDES, known = Fill(exponent + 1).known(m), fill = lowest_bits(known);
  const u32 next = (known + (fill >> 1 & MAGNITUDES) - (fill & ~digit)) | (word & MINUS);
  const u32 fresh = ((((u32)exponent << 7 | ONE_MANTISSA) * PAIR) | (sign & MINUS)) & digit;
  return sel(halves(reached(m, limit)), word, sel(halves(nonzero(m)), next, fresh));
}
FN u32 spread(u32 row, int j) { return (row >> j & PAIR) * 0xffffu; }

extern "C" __global__ void __launch_bounds__(THREADS, 3) planes_refine(const Run* runs, u32* bad, u32 blocks) {
  PROLOGUE(r.held > 0 && r.held < TAIL && r.layers > r.held)
  const int layers = r.layers < TAIL ? r.layers : TAIL, begin = layer_end(r, r.held - 1), end = layer_end(r, layers - 1);
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    for (int g = warp; g < groups; g += WARPS) {
#pragma unroll 1
      for (int w = lane; w < ROW; w += 32) {
        const Place place(r, base + g, w);
        u32 x[16], lows[16], S = 0, sign = 0;
#pragma unroll
        for (int j = 0; j < 16; ++j) {
          x[j] = place.load(j, lows[j]);
          S |= nonzero(x[j] & MAGNITUDES) >> 15 << j;
        }
#pragma unroll 1
        for (int l = r.held, p = begin; l < layers; ++l) {
          u32 N = 0, *at = &f.count[stream_of(l)][g];
          for (; p < layer_end(r, l); ++p) N |= row_word(r, PLANE + p, base + g, w);
          N &= ~S;
          S |= N;
          if (pass) sign |= deposit(r, SIGNS + l, at, N, lane);
          else add_count(at, __popc(N), lane);
        }
        if (!pass) continue;
#pragma unroll 1
        for (int p = begin; p < end; ++p) {
          const u32 row = row_word(r, PLANE + p, base + g, w);
          const int rel = r.top - 1 - p;
          const u32 limit = (u32)(r.threshold + (r.top < rel + 8 ? r.top : rel + 8)) << 7;
#pragma unroll
          for (int j = 0; j < 16; ++j) x[j] = refined(x[j], spread(row, j), spread(sign, j), r.threshold + rel, limit);
        }
#pragma unroll
        for (int j = 0; j < 16; ++j) place.store(j, x[j], lows[j]);
      }
    }
    if (!pass && !settle(f, block, stream_of(r.held), stream_of(layers - 1), nullptr)) GIVE_UP;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 3) planes_tail(const Run* runs, u32* bad, u32 blocks) {
  PROLOGUE(r.held > 0 && r.held <= TAIL && r.layers > TAIL)
  __shared__ u32 sizes[GROUPS];
  __shared__ u32 tails[TAIL_PLANES][THREADS];  // each lane's own
  const u32 lowest = r.threshold + r.tail_cut;
  const u32 limit = (u32)(r.threshold + (r.top < r.tail_cut + 7 ? r.top : r.tail_cut + 7)) << 7;
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    for (int g = warp; g < groups; g += WARPS) {
#pragma unroll 1
      for (int w = lane; w < ROW; w += 32) {
        const Place place(r, base + g, w);
        u32 x[16], kept[16], k0 = 0, k1 = 0, k2 = 0, S = 0;
#pragma unroll
        for (int j = 0; j < 16; ++j) {  // how many digits are known behind the leading one; 7: all
          x[j] = place.load(j, kept[j]);
          const u32 m = x[j] & MAGNITUDES;
          const u32 known = (((m >> 7 & 0x00ff00ffu) | MINUS) - lowest * PAIR) | halves(reached(m, limit));
          k0 |= (known & PAIR) << j;
          k1 |= (known >> 1 & PAIR) << j;
          k2 |= (known >> 2 & PAIR) << j;
          S |= nonzero(m) >> 15 << j;
        }
#pragma unroll 1
        for (int q = 0; q < TAIL_PLANES; ++q) {  // takers of digit q + 1: at most 6 - q known, compared bit by bit
          const u32 c0 = (6 - q) & 1 ? ALL : 0, c1 = (6 - q) & 2 ? ALL : 0, c2 = (6 - q) & 4 ? ALL : 0;
          const u32 at_most = (~k2 & c2) | (~(k2 ^ c2) & ((~k1 & c1) | (~(k1 ^ c1) & (~k0 | c0))));
          u32* at = &f.count[STREAM_TAIL + q][g];
          if (pass) tails[q][threadIdx.x] = deposit(r, TAIL_BITS + q, at, S & at_most, lane);
          else add_count(at, __popc(S & at_most), lane);
        }
        const u32 below = place.inside() & ~S;
        if (!pass) {
          add_count(&f.count[STREAM_RECORDS][g], __popc(below), lane);
          continue;
        }
        u32 lows[3], d[TAIL_PLANES];
#pragma unroll
        for (int q = 0; q < TAIL_PLANES; ++q) d[q] = tails[q][threadIdx.x];
        load_lows(r, base + g, w, lows);
        const Fill lone((int)lowest);
#pragma unroll
        for (int j = 0; j < 16; ++j) {
          u32 digits = 0;
#pragma unroll
          for (int q = 0; q < TAIL_PLANES; ++q) digits = digits << 1 | (d[q] >> j & PAIR);
          const u32 m = x[j] & MAGNITUDES, known = lone.known(m), fill = lowest_bits(known);
          // The fill is 2^(6 - k) where k digits are known: multiplying by it shifts the digits into their place.
          const u32 mantissa = ((digits & 0xffffu) * (fill & 0xffffu) & 0xffffu) >> 6 | (digits >> 16) * (fill >> 16) >> 6 << 16;
          const u32 done = (known - fill + mantissa) | (x[j] & MINUS);
          place.store(j, sel(halves(reached(m, limit)) | ~halves(nonzero(m)), x[j], done), kept[j] | low_bits(lows, j));
        }
        write_records(f, g, place, below, lows, lane);
      }
    }
    if (pass) break;
    if (!settle(f, block, STREAM_TAIL, STREAM_RECORDS, sizes)) GIVE_UP;
    if (!settle_escapes(f, block, groups, sizes)) GIVE_UP;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 3) planes_low(const Run* runs, u32* bad, u32 blocks) {
  PROLOGUE(r.held == LOW && r.layers > LOW)
  const u32 first = block * BLOCK, end = first + (left < BLOCK ? left : BLOCK);
  const u16* low = (const u16*)r.section[LOW_BITS];
  u32* out = (u32*)r.out;
  for (u32 k = first + 4 * threadIdx.x; k < end; k += 4 * THREADS) {
    if (k + 4 <= end) {
      uint4 v = *(uint4*)(out + k);
      const uint2 b = *(const uint2*)(low + k);
      v.x = (v.x & 0xffff0000u) | (b.x & 0xffffu), v.y = (v.y & 0xffff0000u) | b.x >> 16;
      v.z = (v.z & 0xffff0000u) | (b.y & 0xffffu), v.w = (v.w & 0xffff0000u) | b.y >> 16;
      *(uint4*)(out + k) = v;
    } else {
      for (u32 i = k; i < end; ++i) out[i] = (out[i] & 0xffff0000u) | low[i];
    }
  }
}
