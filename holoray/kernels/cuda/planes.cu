// `planes` from scratch: rows of digits to words, without and with the tail.
FN void turn8(u32 (&a)[8]) {  // bit k of byte B of row i -> bit i of byte B of word k
#pragma unroll
  for (int s = 1; s < 8; s <<= 1) {
    const u32 m = s == 1 ? 0x55555555u : s == 2 ? 0x33333333u : 0x0f0f0f0fu;
#pragma unroll
    for (int k = 0; k < 8; ++k)
      if (!(k & s)) {
        const u32 x = a[k], y = a[k + s];
        a[k] = sel(m, x, y << s);
        a[k + s] = sel(m, x >> s, y);
      }
  }
}
template <int S> FN u32 shift_up(u32 (&d)[23]) {  // by S where the top S digits are zero; returns where they are not
  u32 top = 0;
#pragma unroll
  for (int k = 0; k < S; ++k) top |= d[k];
#pragma unroll
  for (int k = 0; k < 7 + S; ++k) d[k] = sel(top, d[k], d[k + S]);
  return top;
}
// d[0..15]: bits 15..0 of a weight's digits X as rows, d[16..22] those after the point (of the tail; or the fill, 1000000).
// -> o[j]: pair j as sign << 15 | (X == 0) << 14 | place of the leading digit << 7 | mantissa.
template <bool FILL> FN void to_pairs(u32 (&d)[23], u32 sign, u32 (&o)[16]) {
  u32 more = 0;
#pragma unroll
  for (int k = 0; k < 15; ++k) more |= d[k];
  const u32 any = more | d[15], lone = d[15] & ~more;
  const u32 e3 = shift_up<8>(d), e2 = shift_up<4>(d), e1 = shift_up<2>(d), e0 = shift_up<1>(d);
  if (FILL) {  // a lone leading digit reads 1.4609375
    d[1] &= ~lone;
    d[2] |= lone, d[3] |= lone, d[4] |= lone, d[6] |= lone, d[7] |= lone;
  }
  u32 lo[8] = {d[7], d[6], d[5], d[4], d[3], d[2], d[1], e0}, hi[8] = {e1, e2, e3, 0, 0, 0, ~any, sign};
  turn8(lo);
  turn8(hi);
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    o[k] = prmt(lo[k], hi[k], 0x6240);
    o[k + 8] = prmt(lo[k], hi[k], 0x7351);
  }
}

// ---- from scratch: layers 0..layers-1. Dynamic shared memory: with the tail the mask of outliers, 8 KiB, else none.
// Loops over streams stay rolled (their code is long), so what they gather lies in shared memory, each lane's own.
template <bool WHOLE> FN void decode(const Run* runs, u32* bad, u32 blocks) {
  PROLOGUE(!r.held && r.layers && (r.layers > TAIL) == WHOLE)
  __shared__ u32 sizes[GROUPS];  // records of each group
  __shared__ u32 tails[TAIL_PLANES][THREADS];
  u32* const outlier = WHOLE ? (u32*)dynamic_shared() : nullptr;
  const int layers = WHOLE ? TAIL : r.layers, planes = layer_end(r, layers - 1);
  if (!check_outliers(f, block, outlier)) GIVE_UP;
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    for (int g = warp; g < groups; g += WARPS) {
#pragma unroll 1
      for (int w = lane; w < ROW; w += 32) {
        const Place place(r, base + g, w);
        u32 S = 0, sign = 0, below = 0;
#pragma unroll 1
        for (int l = 0, p = 0; l < layers; ++l) {
          u32 N = 0, *at = &f.count[stream_of(l)][g];
          for (; p < layer_end(r, l); ++p) N |= row_word(r, PLANE + p, base + g, w);
          N &= ~S;
          S |= N;
          if (pass) sign |= deposit(r, SIGNS + l, at, N, lane);
          else add_count(at, __popc(N), lane);
        }
        if (WHOLE) {
          u32 A = 0;
#pragma unroll 1
          for (int q = 0, p = 0; q < TAIL_PLANES; ++q) {  // takers: significant, and fewer than 8 digits known above
            u32* at = &f.count[STREAM_TAIL + q][g];
            for (; p < planes - 7 + q; ++p) A |= row_word(r, PLANE + p, base + g, w);
            if (pass) tails[q][threadIdx.x] = deposit(r, TAIL_BITS + q, at, S & ~A, lane);
            else add_count(at, __popc(S & ~A), lane);
          }
          below = place.inside() & ~(S | outlier[g * ROW + w]);
          if (!pass) add_count(&f.count[STREAM_RECORDS][g], __popc(below), lane);
        }
        if (!pass) continue;
        u32 d[23], o[16], lows[3] = {0, 0, 0};
#pragma unroll
        for (int q = 0; q < 16; ++q) d[q] = q >= 16 - planes ? row_word(r, PLANE + q - 16 + planes, base + g, w) : 0;
#pragma unroll
        for (int q = 0; q < TAIL_PLANES; ++q) d[16 + q] = WHOLE ? tails[q][threadIdx.x] : q ? 0 : ALL;
        to_pairs<!WHOLE>(d, sign, o);
        if (WHOLE) load_lows(r, base + g, w, lows);
        const u32 bias = (u32)(r.threshold + r.top - planes) * (PAIR << 7);
#pragma unroll
        for (int j = 0; j < 16; ++j) place.store(j, (o[j] + bias) & ~halves(o[j] << 1), low_bits(lows, j));
        if (WHOLE) write_records(f, g, place, below, lows, lane);
      }
    }
    if (pass) break;
    if (!settle(f, block, 0, WHOLE ? STREAM_RECORDS : stream_of(layers - 1), sizes)) GIVE_UP;
    if (WHOLE && !settle_escapes(f, block, groups, sizes)) GIVE_UP;
  }
  patch_outliers(r, block);
}
extern "C" __global__ void __launch_bounds__(THREADS, 3) planes_decode(const Run* runs, u32* bad, u32 blocks) { decode<false>(runs, bad, blocks); }
extern "C" __global__ void __launch_bounds__(THREADS, 3) planes_decode_tail(const Run* runs, u32* bad, u32 blocks) { decode<true>(runs, bad, blocks); }

