// Packing for the register tile: from the tensors as they are to panels [units][columns] of 32-bit units.
//
// Weights w [k][taps][c] (KRSC). Panel j of the forward pass holds columns k = 32 j .., units (tap, c): a transpose of
// 32-bit units, 16 x 16 at a time in registers (4 stages of 16 two-source permutes: 0.25 permutes per unit). Panel j of
// the data gradient holds columns c = 32 j .., units (tap, k): a copy (fp32), or rows k and k + 1 zipped (bf16).
// Columns and units past the end are zero. Weights of a whole network come from memory, in pieces of 64 to 128 bytes
// a row apart, which no hardware prefetcher follows: so packing asks for the lines of the next 16 or 32 columns, at the
// place in their rows where it is in these. All of ResNet50's convolutions at 32 px and batch 4 in turn, 2 cores of a
// Zen 4, least of 3 medians, ms, without : with: forward fp32 7.0 : 5.6 (packed before 4.3), bf16 4.0 : 2.9 (2.2); data
// gradient bf16 4.4 : 3.0; data gradient fp32, weights in place without packing 7.5, packed 6.1. At batch 1 in place
// and packed are equal. The same lines asked for by the convolution before, while it multiplies: inference at batch 1
// 2.4 : 3.6 fp32, 1.1 : 2.0 bf16, and a training step 4% slower: prefetches that come too early cost more than they
// save. Bytes: the weights once in, the panel once out (L2); 1/rows of the arithmetic that reads it.

namespace fastconv::cpu::FASTCONV_ISA_NS {

template <int D>
FASTCONV_INLINE void transpose_stage(u32v (&t)[kLanes]) {
  i32v low, high;
  for (int l = 0; l < kLanes; ++l) {
    low[l] = (l & D) ? kLanes + l - D : l;
    high[l] = (l & D) ? kLanes + l : l + D;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & D) continue;
    const u32v a = t[i], b = t[i + D];
    t[i] = __builtin_shuffle(a, b, low);
    t[i + D] = __builtin_shuffle(a, b, high);
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

// Units [u0, u1) of kLanes rows that start at `rows`, `stride` bytes apart, `n_rows` of them real; to columns of a
// panel. A row ends after `stride` bytes: the last unit may be half a one. more: as many rows follow, and are asked
// for.
inline void pack_transposed(const char* rows, int64_t stride, int n_rows, int64_t u0, int64_t u1, char* panel,
                            bool more) {
  for (int64_t u = u0; u < u1; u += kLanes) {
    if (more) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) __builtin_prefetch(rows + (kLanes + i) * stride + u * 4, 0, 2);
    }
    const int n = u1 - u < kLanes ? (int)(u1 - u) : kLanes;
    u32v t[kLanes];
    const int64_t bytes = stride - u * 4 < n * 4 ? stride - u * 4 : n * 4;
    if (bytes == kLanes * 4 && n_rows == kLanes) {
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) t[i] = *(const u32v_u*)(rows + i * stride + u * 4);
    } else {
      for (int i = 0; i < kLanes; ++i) {
        t[i] = u32v{};
        if (i < n_rows) __builtin_memcpy(&t[i], rows + i * stride + u * 4, bytes);
      }
    }
    transpose(t);
    for (int i = 0; i < n; ++i) *(u32v*)(panel + (u + i) * kTileCols * 4) = t[i];
  }
}

// One vector of units from two rows of n elements (b is not read for fp32; null reads as zeros).
FASTCONV_INLINE u32v zip_units(const float* a, const float*, int n) { return (u32v)load_lanes(a, n); }
FASTCONV_INLINE u32v zip_units(const bf16* a, const bf16* b, int n) {
  const u32v low = (u32v)load_lanes(a, n);
  const u32v high = b ? (u32v)load_lanes(b, n) : u32v{};
  return (low >> 16) | high;  // load_lanes() widens: the bits are in the upper half
}

template <class T>
constexpr int kUnitElements = 4 / sizeof(T);

template <class T>
void pack_forward(const T* w, int64_t k, int64_t taps, int64_t c, const uint8_t* live, int64_t j, char* panel) {
  const int64_t tap_units = (c + kUnitElements<T> - 1) / kUnitElements<T>;
  for (int v = 0; v < kTileVecs; ++v) {
    const int64_t k0 = j * kTileCols + v * kLanes;
    const int n_rows = k - k0 >= kLanes ? kLanes : (k > k0 ? (int)(k - k0) : 0);
    char* to = panel + v * FASTCONV_VEC_BYTES;
    const T* from = w + (n_rows ? k0 : 0) * taps * c;
    if (c % kUnitElements<T> == 0 || taps == 1) {
      for (int64_t tap = 0; tap < taps;) {
        int64_t end = tap;
        while (end < taps && live[end]) ++end;
        if (end > tap)
          pack_transposed((const char*)from, taps * c * sizeof(T), n_rows, tap * tap_units, end * tap_units, to,
                          k - k0 >= 2 * kLanes);
        tap = end + 1;
      }
      continue;
    }
    // Odd channels of bf16: the last unit of every tap is half empty.
    for (int64_t u = 0; u < taps * tap_units; ++u) {
      for (int i = 0; i < kLanes; ++i) {
        T pair[kUnitElements<T>] = {};
        const int64_t c0 = u % tap_units * kUnitElements<T>;
        for (int h = 0; h < kUnitElements<T>; ++h)
          if (i < n_rows && c0 + h < c) pair[h] = from[(i * taps + u / tap_units) * c + c0 + h];
        __builtin_memcpy(to + (u * kTileCols + i) * 4, pair, 4);
      }
    }
  }
}

template <class T>
void pack_transpose(const T* w, int64_t k, int64_t taps, int64_t c, const uint8_t* live, int64_t j, char* panel) {
  constexpr int E = kUnitElements<T>;
  const int64_t tap_units = (k + E - 1) / E, c0 = j * kTileCols;
  for (int64_t u = 0; u < tap_units; ++u) {  // k outside, taps inside: a page of w is read at one time
    for (int64_t tap = 0; tap < taps; ++tap) {
      if (!live[tap]) continue;
      const T* a = w + (u * E * taps + tap) * c;
      const T* b = E == 2 && u * 2 + 1 < k ? a + taps * c : nullptr;
      for (int i = 0; i < kTileCols; i += kLanes * E) {
        __builtin_prefetch(a + c0 + kTileCols + i, 0, 2);
        if (b) __builtin_prefetch(b + c0 + kTileCols + i, 0, 2);
      }
      for (int v = 0; v < kTileVecs; ++v) {
        const int64_t at = c0 + v * kLanes;
        const int n = c - at >= kLanes ? kLanes : (int)(c - at);
        u32v* to = (u32v*)(panel + ((tap * tap_units + u) * kTileCols + v * kLanes) * 4);
        *to = n > 0 ? zip_units(a + at, b ? b + at : nullptr, n) : u32v{};
      }
    }
  }
}

}  // namespace fastconv::cpu::FASTCONV_ISA_NS
