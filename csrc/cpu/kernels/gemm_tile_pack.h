// Packing for the register tile: from the tensors as they are to panels [units][columns] of 32-bit units.
//
// Weights w [k][taps][c] (KRSC). Panel j of the forward pass holds columns k = 32 j .., units (tap, c): a transpose of
// 32-bit units, 16 x 16 at a time in registers (4 stages of 16 two-source permutes: 0.25 permutes per unit). Panel j of
// the data gradient holds columns c = 32 j .., units (tap, k): a copy (fp32), or rows k and k + 1 zipped (bf16).
// Columns and units past the end are zero. Weights W are of the panel's dtype T, or fp32 and rounded to bf16 on the way
// (autocast: no copy of the weights in bf16 is made). Weights of a whole network come from memory, in pieces of 64 to
// 128 bytes a row apart, which no hardware prefetcher follows: so packing asks for the lines of the next 16 or 32
// columns, at the place in their rows where it is in these (data gradient: of the units eight further on). All of
// ResNet50's convolutions at 32 px and batch 4 in turn, 2 cores of a Zen 4, least of 3 medians, ms, without : with:
// forward fp32 7.0 : 5.6 (packed before 4.3), bf16 4.0 : 2.9 (2.2); data gradient bf16 4.4 : 3.0; data gradient fp32,
// weights in place without packing 7.5, packed 6.1 (a panel at a time; conv_few_rows.h reads them in order). At
// batch 1 in place and packed are equal. The same lines asked for by the convolution before, while it multiplies:
// inference at batch 1 2.4 : 3.6 fp32, 1.1 : 2.0 bf16, and a training step 4% slower: prefetches that come too early
// cost more than they save. Data gradient, several panels from one pass over the weights instead of a pass each, 2
// cores of an Intel Xeon with AMX, batch 4, ms: fp32 6.6 : 6.0, bf16 4.2 : 3.3, with 1 MB of panels instead of half 5.9
// and 3.0; 16 units ahead as 8, 4 a twentieth slower. Padded panels (their lines share cache sets) gained nothing, nor
// did zipping whole vectors. Bytes: the weights once in, the panel once out (L2); 1/rows of the arithmetic that reads
// it.

namespace fastconv::cpu::FASTCONV_ISA_NS {

// How a stage of the transpose shuffles vectors i and i + D: into i and into i + D.
template <int D>
struct StageLanes {
  i32v low, high;
  FASTCONV_INLINE StageLanes() {
    for (int l = 0; l < kLanes; ++l) {
      low[l] = (l & D) ? kLanes + l - D : l;
      high[l] = (l & D) ? kLanes + l : l + D;
    }
  }
};

template <int D>
FASTCONV_INLINE void transpose_stage(u32v (&t)[kLanes]) {
  const StageLanes<D> lanes;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & D) continue;
    const u32v a = t[i], b = t[i + D];
    t[i] = __builtin_shuffle(a, b, lanes.low);
    t[i + D] = __builtin_shuffle(a, b, lanes.high);
  }
}

FASTCONV_INLINE void transpose(u32v (&t)[kLanes]) {
  transpose_stage<1>(t);
  transpose_stage<2>(t);
  if constexpr (kLanes >= 8) transpose_stage<4>(t);
  if constexpr (kLanes >= 16) transpose_stage<8>(t);
}

// `count` pieces of `bytes` bytes, `step` bytes apart, one after the other. Whole vectors: reads and writes up to 63
// bytes too far.
FASTCONV_INLINE void copy_pieces(const char* from, int64_t step, int64_t count, int64_t bytes, char* to) {
  for (int64_t i = 0; i < count; ++i, from += step, to += bytes)
    for (int64_t b = 0; b < bytes; b += FASTCONV_VEC_BYTES) *(u32v_u*)(to + b) = *(const u32v_u*)(from + b);
}

template <class T>
constexpr int kUnitElements = 4 / sizeof(T);

// kLanes units of T from as many elements W, or from the first n (zeros behind).
template <class T, class W>
FASTCONV_INLINE u32v load_units(const W* p) {
  if constexpr (sizeof(T) == sizeof(W)) {
    return *(const u32v_u*)p;
  } else {
    const f32v low = Vec<W>::load(p), high = Vec<W>::load(p + kLanes);
#ifdef FASTCONV_DPBF16
    return (u32v)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
#elif FASTCONV_VEC_BYTES == 32
    const __m256i pieces = _mm256_packus_epi32((__m256i)bf16_bits(low), (__m256i)bf16_bits(high));
    return (u32v)_mm256_permute4x64_epi64(pieces, 0xd8);  // low's halves came first and third
#else
    const u16v halves[2] = {narrow(T{}, low), narrow(T{}, high)};
    u32v units;
    __builtin_memcpy(&units, halves, sizeof units);
    return units;
#endif
  }
}
template <class T, class W>
FASTCONV_INLINE u32v load_units(const W* p, int64_t n) {
  W elements[kLanes * kUnitElements<T>] = {};
  __builtin_memcpy(elements, p, n * sizeof(W));
  return load_units<T>(elements);
}

// Units [u0, u1) of kLanes rows that start at `rows`, `stride` elements apart, `n_rows` of them real; to columns of a
// panel. A row ends after `stride` elements: the last unit may be half a one. more: as many rows follow, and are asked
// for.
template <class T, class W>
void pack_transposed(const W* rows, int64_t stride, int n_rows, int64_t u0, int64_t u1, char* panel, bool more) {
  constexpr int E = kUnitElements<T>;
  for (int64_t u = u0; u < u1; u += kLanes) {
    const W* from = rows + u * E;
    if (more) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        __builtin_prefetch(from + (kLanes + i) * stride, 0, 2);
        if (sizeof(W) > sizeof(T)) __builtin_prefetch(from + (kLanes + i) * stride + kLanes, 0, 2);
      }
    }
    const int n = u1 - u < kLanes ? (int)(u1 - u) : kLanes;
    u32v t[kLanes];
    const int64_t elements = stride - u * E < n * E ? stride - u * E : n * E;
    if (elements == kLanes * E && n_rows == kLanes) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) t[i] = load_units<T>(from + i * stride);
    } else {
      for (int i = 0; i < kLanes; ++i) t[i] = i < n_rows ? load_units<T>(from + i * stride, elements) : u32v{};
    }
    transpose(t);
    for (int i = 0; i < n; ++i) *(u32v*)(panel + (u + i) * kTileCols * 4) = t[i];
  }
}

// One vector of units of T from two rows of n elements (b is not read for fp32; null reads as zeros).
template <class T, class W>
FASTCONV_INLINE u32v zip_units(const W* a, const W* b, int n) {
  if constexpr (sizeof(T) == 4) {
    return (u32v)load_lanes(a, n);
  } else {
    const auto upper = [n](const W* p) {  // the bits in the upper half of each lane, as load_lanes() widens them
      const f32v x = load_lanes(p, n);
      return (u32v)(sizeof(W) == sizeof(T) ? x : rounded(bf16{}, x));
    };
    return (upper(a) >> 16) | (b ? upper(b) : u32v{});
  }
}

template <class T, class W>
void pack_forward(const W* w, int64_t k, int64_t taps, int64_t c, const uint8_t* live, int64_t j, char* panel) {
  const int64_t tap_units = (c + kUnitElements<T> - 1) / kUnitElements<T>;
  for (int v = 0; v < kTileVecs; ++v) {
    const int64_t k0 = j * kTileCols + v * kLanes;
    const int n_rows = k - k0 >= kLanes ? kLanes : (k > k0 ? (int)(k - k0) : 0);
    char* to = panel + v * FASTCONV_VEC_BYTES;
    const W* from = w + (n_rows ? k0 : 0) * taps * c;
    if (c % kUnitElements<T> == 0 || taps == 1) {
      for (int64_t tap = 0; tap < taps;) {
        int64_t end = tap;
        while (end < taps && live[end]) ++end;
        if (end > tap)
          pack_transposed<T>(from, taps * c, n_rows, tap * tap_units, end * tap_units, to, k - k0 >= 2 * kLanes);
        tap = end + 1;
      }
      continue;
    }
    // Odd channels of bf16: the last unit of every tap is half empty.
    for (int64_t u = 0; u < taps * tap_units; ++u) {
      for (int i = 0; i < kLanes; ++i) {
        const int64_t c0 = u % tap_units * kUnitElements<T>;
        const int64_t n = c - c0 < kUnitElements<T> ? c - c0 : kUnitElements<T>;
        const u32v unit = load_units<T>(from + (i * taps + u / tap_units) * c + c0, i < n_rows ? n : 0);
        __builtin_memcpy(to + (u * kTileCols + i) * 4, &unit, 4);
      }
    }
  }
}

// Panels [j0, j1), from `out` on, panel_bytes apart. k outside, then taps, then panels: what is read of w at one time
// lies side by side.
template <class T, class W>
void pack_transpose(const W* w, int64_t k, int64_t taps, int64_t c, const uint8_t* live, int64_t j0, int64_t j1,
                    char* out, int64_t panel_bytes) {
  constexpr int E = kUnitElements<T>;
  constexpr int kAhead = 8;
  const int64_t tap_units = (k + E - 1) / E;
  for (int64_t u = 0; u < tap_units; ++u) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      if (!live[tap]) continue;
      const W* a = w + (u * E * taps + tap) * c;
      const W* b = E == 2 && u * 2 + 1 < k ? a + taps * c : nullptr;
      char* to = out + (tap * tap_units + u) * kTileCols * 4;
      const int64_t ahead = kAhead * E * taps * c;
      for (int64_t j = j0; j < j1; ++j, to += panel_bytes) {
        const int64_t c0 = j * kTileCols;
        for (int i = 0; i < kTileCols && u + kAhead < tap_units; i += 64 / (int)sizeof(W)) {
          __builtin_prefetch(a + ahead + c0 + i, 0, 2);
          if (b) __builtin_prefetch(b + ahead + c0 + i, 0, 2);
        }
        for (int v = 0; v < kTileVecs; ++v) {
          const int64_t at = c0 + v * kLanes;
          const int n = c - at >= kLanes ? kLanes : (int)(c - at);
          ((u32v*)to)[v] = n > 0 ? zip_units<T>(a + at, b ? b + at : nullptr, n) : u32v{};
        }
      }
    }
  }
}

}  // namespace fastconv::cpu::FASTCONV_ISA_NS
