// The tile of the row-class convolution in AMX's tile registers (bf16; Intel's Sapphire Rapids and later): 32 rows x 32
// columns, fp32 sums in four registers, two registers of rows, two of columns.
//
// A register holds 16 rows of 64 bytes: 16 rows of 16 units, or 16 units of 16 columns - a packed panel as it is
// (gemm_tile.h: a unit is two bf16 channels). TDPBF16PS adds the product of one of each to a register of sums in 16
// cycles: 1024 FLOPs a cycle, 8 times two vector dot products a cycle. A step of 16 units loads 4 registers (8 cycles
// each from L1) for 4 products. Rows that lie evenly (1x1 filters, a long image row, one position of every image) are
// loaded where they are; others are copied once, in the order of the loads, and meet all panels: 2 cycles per line of
// 64 bytes, against 2 cycles of products for each panel. A last piece of less than 16 units is copied on both sides,
// with zeros behind: what lies there may be anything. Sums: fp32, rounded to nearest even, denormals are zero (the
// instruction's own rule); every 64 steps they are folded into a second sum in memory, as in gemm_tile.h.
//
// Measured on 2 cores of an Intel Xeon, ms, a training step's convolutions of ResNet50 at 32 px, AVX-512 bf16 : here,
// batch 64: forward 39.4 : 7.6, data gradients 39.8 : 8.6, weight gradients with the update 47.8 : 15.3; batch 4: 4.1
// : 2.5, 5.8 : 4.3, 9.4 : 8.4 (weights from memory). Against oneDNN's AMX kernels:
// bench/results/cpu-intel-xeon-amx-2-cores.
//
// Intel 64 and IA-32 Architectures Software Developer's Manual, vol. 1 chapter 18.

namespace fastconv::cpu::FASTCONV_ISA_NS {

constexpr int64_t kRegisterBytes = 1024;
constexpr int64_t kRowBytes = 64;                   // of a register
constexpr int64_t kPanelStep = 16 * kTileCols * 4;  // 16 units of a panel
constexpr int64_t kPanelRow = kTileCols * 4;        // one unit of a panel
constexpr int64_t kFoldSteps = 64;                  // 1024 units

// The intrinsics are statements of assembly that name no memory: nothing that they read may be written after them.
#define FASTCONV_TILE_FENCE asm volatile("" ::: "memory")

// All registers in their full size, from construction to the end of the scope, for this thread.
struct TileRegisters {
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette, start, unused[14];
      uint16_t bytes[16];
      uint8_t rows[16];
    } config{};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) config.bytes[i] = kRowBytes, config.rows[i] = 16;
    FASTCONV_TILE_FENCE;
    _tile_loadconfig(&config);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

FASTCONV_INLINE u32v load_units_masked(const char* p, int64_t n) {
  return (u32v)_mm512_maskz_loadu_epi32((__mmask16)((1u << n) - 1), p);
}

// Whether the n rows lie evenly, so that a register can load them where they are; with fewer than 16 it reads on behind
// them, which must be input too.
template <class T, class W>
FASTCONV_INLINE bool lie_evenly(const RowsTask<T, W>& t, const char* const* rows, int n, int64_t bytes) {
  const int64_t step = n > 1 ? rows[1] - rows[0] : 0;
  for (int i = 2; i < n; ++i)
    if (rows[i] - rows[i - 1] != step) return false;
  if (n == kGrain) return true;
  const char *a = rows[0], *b = a + (kGrain - 1) * step;
  const char *low = a < b ? a : b, *high = (a < b ? b : a) + bytes;
  return t.plan->gather_r == 0 && low >= (const char*)t.input && high <= t.input_end;
}

// How the registers load tile i's rows, rows[half] of them: t.table[segment * kTileRows + row] as fill_tile() left it.
template <class T, class W>
inline void stage_rows(const RowsTask<T, W>& t, const RowsGroup& group, const int* rows, int64_t i) {
  RowsSource* sources = t.sources + i * t.sources_tile;
  char* staged = t.staged + i * t.staged_tile;
  for (int g = 0; g < group.n_segments; ++g) {
    const int64_t units = group.segments[g].units, steps = units / kTileUnits, rest = units % kTileUnits;
    for (int half = 0; half < 2 && rows[half] > 0; ++half) {
      const char* const* from = t.table + g * kTileRows + half * kGrain;
      if (rest == 0 && lie_evenly(t, from, rows[half], units * 4)) {
        sources[g * 2 + half] = {from[0], rows[half] > 1 ? from[1] - from[0] : 0, kRowBytes};
        continue;
      }
      for (int r = 0; r < rows[half]; ++r) {
        char* to = staged + r * kRowBytes;
        const char* row = from[r];
        for (int64_t s = 0; s < steps; ++s, to += kRegisterBytes, row += kRowBytes) *(u32v*)to = *(const u32v_u*)row;
        if (rest) *(u32v*)to = load_units_masked(row, rest);
      }
      sources[g * 2 + half] = {staged, kRowBytes, kRegisterBytes};
      staged += (steps + (rest != 0)) * kRegisterBytes;
    }
  }
}

// Registers 0 to 3: the sums of 16 rows x 32 columns and of the 16 rows below.
#define FASTCONV_TILE_ZERO \
  do {                     \
    _tile_zero(0);         \
    _tile_zero(1);         \
    _tile_zero(2);         \
    _tile_zero(3);         \
  } while (0)
#define FASTCONV_TILE_STORE(low, high, step)          \
  do {                                                \
    _tile_stored(0, low, step);                       \
    _tile_stored(1, (char*)(low) + kRowBytes, step);  \
    _tile_stored(2, high, step);                      \
    _tile_stored(3, (char*)(high) + kRowBytes, step); \
  } while (0)

// Registers 0 to 3 to memory, or onto what is there: [row][kTileVecs]. HALVES 1: 2 and 3 are a second sum of 0 and 1.
template <int HALVES>
FASTCONV_INLINE void fold_registers(f32v* sums, bool add) {
  f32v part[kTileRows * kTileVecs];
  f32v *low = add ? part : sums, *high = add || HALVES == 1 ? part + kGrain * kTileVecs : sums + kGrain * kTileVecs;
  FASTCONV_TILE_STORE(low, high, kPanelRow);
  if (add)
    for (int i = 0; i < HALVES * kGrain * kTileVecs; ++i) sums[i] += part[i];
  if (HALVES == 1)
    for (int i = 0; i < kGrain * kTileVecs; ++i) sums[i] += high[i];
}

// One step of 16 units: rows at a0 and a1, columns at b.
#define FASTCONV_TILE_STEP2(a0, step0, a1, step1, b) \
  do {                                               \
    _tile_loadd(6, b, kPanelRow);                    \
    _tile_loadd(4, a0, step0);                       \
    _tile_loadd(7, (b) + kRowBytes, kPanelRow);      \
    _tile_dpbf16ps(0, 4, 6);                         \
    _tile_loadd(5, a1, step1);                       \
    _tile_dpbf16ps(1, 4, 7);                         \
    _tile_dpbf16ps(2, 5, 6);                         \
    _tile_dpbf16ps(3, 5, 7);                         \
  } while (0)

// The same for 16 rows, onto the registers C0 and C1: two sums in turn, since a product waits 52 cycles for the last.
#define FASTCONV_TILE_STEP1(C0, C1, a0, step0, b) \
  do {                                            \
    _tile_loadd(6, b, kPanelRow);                 \
    _tile_loadd(4, a0, step0);                    \
    _tile_loadd(7, (b) + kRowBytes, kPanelRow);   \
    _tile_dpbf16ps(C0, 4, 6);                     \
    _tile_dpbf16ps(C1, 4, 7);                     \
  } while (0)

template <int HALVES>
FASTCONV_INLINE void multiply_steps(const char*& a0, const char*& a1, const RowsSource* s, const char*& b, int64_t n) {
  if constexpr (HALVES == 2) {
    for (int64_t i = 0; i < n; ++i, a0 += s[0].next, a1 += s[1].next, b += kPanelStep)
      FASTCONV_TILE_STEP2(a0, s[0].step, a1, s[1].step, b);
  } else {
    for (; n > 1; n -= 2) {
      FASTCONV_TILE_STEP1(0, 1, a0, s[0].step, b);
      FASTCONV_TILE_STEP1(2, 3, a0 + s[0].next, s[0].step, b + kPanelStep);
      a0 += 2 * s[0].next;
      b += 2 * kPanelStep;
    }
    if (n > 0) {
      FASTCONV_TILE_STEP1(0, 1, a0, s[0].step, b);
      a0 += s[0].next;
      b += kPanelStep;
    }
  }
}

template <int HALVES>
FASTCONV_INLINE void multiply_tile(const RowsSource* sources, const RowsSegment* segments, int n_segments,
                                   const char* panel, f32v* sums) {
  FASTCONV_TILE_FENCE;
  FASTCONV_TILE_ZERO;
  int64_t done = 0;
  bool folded = false;
  for (int g = 0; g < n_segments; ++g) {
    const RowsSource* s = sources + 2 * g;
    const char *a0 = s[0].base, *a1 = HALVES == 2 ? s[1].base : nullptr, *b = panel + segments[g].panel * kPanelRow;
    const int64_t rest = segments[g].units % kTileUnits;
    for (int64_t left = segments[g].units / kTileUnits; left > 0;) {
      if (done == kFoldSteps) {
        fold_registers<HALVES>(sums, folded);
        FASTCONV_TILE_ZERO;
        folded = true;
        done = 0;
      }
      const int64_t n = left < kFoldSteps - done ? left : kFoldSteps - done;
      multiply_steps<HALVES>(a0, a1, s, b, n);
      left -= n;
      done += n;
    }
    if (rest) {
      u32v last[kTileUnits * kTileVecs];
      for (int i = 0; i < kTileUnits * kTileVecs; ++i) last[i] = i < rest * kTileVecs ? ((const u32v_u*)b)[i] : u32v{};
      const char* zeroed = (const char*)last;
      FASTCONV_TILE_FENCE;
      multiply_steps<HALVES>(a0, a1, s, zeroed, 1);
    }
  }
  fold_registers<HALVES>(sums, folded);
}

// finish() of gemm_tile.h for whole rows of 32 columns.
inline void finish_whole(const RowsEpilogue<bf16>& e, const int64_t* at, int64_t j, const f32v* sums, int n_rows) {
  const auto pair = [](f32v low, f32v high) { return (u32v)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); };
  if (is_plain(e)) {
    for (int i = 0; i < n_rows; ++i) *(u32v_u*)(e.out + at[i] + j) = pair(sums[2 * i], sums[2 * i + 1]);
    return;
  }
  f32v scale[2], mean[2], shift[2];
  for (int v = 0; v < 2; ++v) {
    scale[v] = e.scale ? Vec<float>::load(e.scale + j + v * kLanes) : f32v{} + 1.0f;
    mean[v] = e.mean ? Vec<float>::load(e.mean + j + v * kLanes) : f32v{};
    shift[v] = e.shift ? Vec<float>::load(e.shift + j + v * kLanes) : f32v{};
  }
  for (int i = 0; i < n_rows; ++i) {
    f32v y[2];
    for (int v = 0; v < 2; ++v) y[v] = (sums[2 * i + v] - mean[v]) * scale[v] + shift[v];
    if (e.residual)
      for (int v = 0; v < 2; ++v) y[v] += Vec<bf16>::load(e.residual + at[i] + j + v * kLanes);
    if (e.pre) *(u32v_u*)(e.pre + at[i] + j) = pair(y[0], y[1]);
    *(u32v_u*)(e.out + at[i] + j) = pair(activate(y[0], e.act), activate(y[1], e.act));
  }
}

template <class T>
__attribute__((noinline)) void tile_rows_amx(const int* rows, const RowsSource* sources, const RowsSegment* segments,
                                             int n_segments, const char* panel, const RowsEpilogue<T>& e,
                                             const int64_t* at, int64_t j, int64_t columns) {
  for (int half = 0; half < 2; ++half)
    for (int i = 0; i < rows[half]; ++i) prefetch_ends(e, at[half * kGrain + i] + j);
  f32v sums[kTileRows * kTileVecs];
  if (rows[1] > 0)
    multiply_tile<2>(sources, segments, n_segments, panel, sums);
  else
    multiply_tile<1>(sources, segments, n_segments, panel, sums);
  for (int half = 0; half < 2 && rows[half] > 0; ++half, at += kGrain) {
    const f32v* from = sums + half * kGrain * kTileVecs;
    if (columns - j >= kTileCols)
      finish_whole(e, at, j, from, rows[half]);
    else
      finish(e, at, j, from, rows[half], (int)(columns - j));
  }
}

#undef FASTCONV_TILE_STEP1
#undef FASTCONV_TILE_STEP2

}  // namespace fastconv::cpu::FASTCONV_ISA_NS
