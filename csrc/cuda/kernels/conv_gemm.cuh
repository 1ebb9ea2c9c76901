// Convolution forward and data gradient: one implicit GEMM kernel over the live filter taps.
//
//   fprop   y[n,p,q,k]  = sum_{r,s,c} act(x[n,h,w,c]) w[k,r,s,c],  h = p stride - pad + r dil (w likewise), zero
//   outside dgrad   dx[n,h,w,c] = sum_{r,s,k} dy[n,p,q,k] w[k,r,s,c],      h + pad - r dil = p stride
//
// GEMM view: rows m = output positions (of one stride class in dgrad), columns = output channels, K = live taps x inner
// channels. A (gathered activations) is K-major; B (filters) is K-major in fprop and MN-major in dgrad, which reads the
// same [k,r,s,c] weights through ldmatrix.trans, so that no transposed copy of the weights is made.
//
// Mapping: block = BM x BN outputs; grid.x = m-tiles x n-tiles (n fastest, so that neighbours share A in L2), grid.y =
// groups x stride classes, grid.z = K splits. A warp owns WM x WN. k-tiles of kKBytes run through a ring of kStages in
// shared memory filled by cp.async; one barrier per k-tile. Taps that only see padding for the whole tile are never
// visited. Fused: prologue on A (register-staged then, since cp.async cannot compute), epilogue of conv_epilogue.cuh
// and its sums over rows. Accumulation: fp32. Limits: size_limits.h. FLOPs 2 m n K(live); least bytes: x, w, y once
// each.
#pragma once

#include "conv_engine.cuh"
#include "conv_epilogue.cuh"
#include "launch.cuh"

namespace fastconv {

template <class T>
struct ConvGemmParams {
  const T* a;  // x (fprop) or dy (dgrad)
  const T* b;  // weights [k, r, s, c / groups]
  ConvShape shape;
  ConvPrologue prologue;
  ConvEpilogue<T> epilogue;
  FastDiv inner;         // by the inner channels: c / groups (fprop), k / groups (dgrad)
  ConvAxis h, w;         // where there is one stride class; the kernel works out those of several
  int m_tiles, n_tiles;  // of the largest stride class
  int splits;
  int64_t out_elems;  // size of one split's partial sums
  bool vec_out;       // 16-byte accesses to out, residual, ... are aligned
};

template <class T_, bool Tensor_, bool Dgrad_, bool Prologue_, int BM_, int BN_, int WM_, int WN_, int KBytes_,
          int Stages_, int VecBytes_>
struct ConvGemmTraits {
  using T = T_;
  static constexpr bool kTensor = Tensor_, kDgrad = Dgrad_, kPrologue = Prologue_;
  static constexpr int BM = BM_, BN = BN_, WM = WM_, WN = WN_, kKBytes = KBytes_, kStages = Stages_,
                       kVecBytes = VecBytes_;
  static constexpr int kElem = static_cast<int>(sizeof(T));
  static constexpr int BK = kKBytes / kElem;
  static constexpr int kWarpsM = BM / WM, kWarpsN = BN / WN;
  static constexpr int kThreads = kWarpsM * kWarpsN * kWarp;
  static constexpr bool kAsyncB = kVecBytes >= 4;
  static constexpr bool kAsyncA = kAsyncB && !kPrologue;
  static constexpr int kTileA = BM * kKBytes, kTileB = BN * kKBytes;
  static_assert(BM % WM == 0 && BN % WN == 0, "warps tile the block");
  static_assert(kThreads <= 1024, "a block has at most 1024 threads");
  static_assert(kStages >= 2, "a stage is filled while another is read");

  // Blocks that an SM should hold: accumulators + addresses and fragments + what the variant adds, out of 64 Ki
  // registers.
  static constexpr int kRegisters = BM * BN / kThreads + 64 + (kPrologue ? 64 : 0) + (kDgrad ? 8 : 0) +
                                    (kElem == 4 ? 32 : 0) + (kVecBytes < 16 ? 64 : 0) + (kTensor ? 0 : 32);

  using Engine = std::conditional_t<kTensor, TensorEngine<T, WM, WN, kKBytes, false, kDgrad, BM, BN>,
                                    SimtEngine<T, WM, WN, kKBytes, false, kDgrad, BM, BN>>;
  using CopyA = TileCopy<T, BM, kKBytes, kVecBytes, kThreads, kAsyncA, false>;
  using CopyB = std::conditional_t<kDgrad, TileCopy<T, BK, BN * kElem, kVecBytes, kThreads, kAsyncB, kElem == 4>,
                                   TileCopy<T, BN, kKBytes, kVecBytes, kThreads, kAsyncB, false>>;
  using Out = Epilogue<Engine, T, BN, kDgrad ? ColumnSums::kGradient : ColumnSums::kMoments>;

  static constexpr int kRing = kStages * (kTileA + kTileB);
  static constexpr int kSlabs =
      kWarpsM * kWarpsN * Out::kSlabFloats * 4 + kWarpsM * BN * static_cast<int>(sizeof(typename Out::State));
  static constexpr int kMain = ((kRing > kSlabs ? kRing : kSlabs) + 15) / 16 * 16;  // the epilogue reuses the ring
  static constexpr int kSmem = kMain + BM * (16 + 8);
  // No more than fit an SM's shared memory at most (227 KiB, one of which is each block's): else registers would be
  // saved, and spilled, for blocks that cannot be there.
  static constexpr int kMinBlocks =
      max_int(min_int(min_int(65536 / (kThreads * kRegisters), 232448 / (kSmem + 1024)), 8), 1);
};

struct alignas(16) ConvRow {  // where GEMM row m starts to read: one shared-memory access
  int64_t image;              // element offset of its image (and group); -1: no such row
  int h, w;
};

template <class Tr>
__global__ void __launch_bounds__(Tr::kThreads, Tr::kMinBlocks) conv_gemm_kernel(ConvGemmParams<typename Tr::T> p) {
  using T = typename Tr::T;
  DYN_SMEM(smem);
  auto* rows = reinterpret_cast<ConvRow*>(smem + Tr::kMain);
  auto* row_out = reinterpret_cast<int64_t*>(rows + Tr::BM);
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const ConvShape& g = p.shape;
  const int group = blockIdx.y % g.groups, cls = blockIdx.y / g.groups;
  const int cg = g.c / g.groups, kg = g.k / g.groups;

  // Geometry of this block's stride class. "in" is the gathered tensor, "out" the written one.
  ConvAxis ah = p.h, aw = p.w;
  if (Tr::kDgrad && gridDim.y != static_cast<unsigned>(g.groups)) {
    int classes_w = min_int(g.stride_w, g.w);
    ah = dgrad_axis(g.h, g.p, g.r, g.stride_h, g.pad_h, g.dil_h, cls / classes_w);
    aw = dgrad_axis(g.w, g.q, g.s, g.stride_w, g.pad_w, g.dil_w, cls % classes_w);
  }
  const int in_channels = Tr::kDgrad ? g.k : g.c, out_channels = Tr::kDgrad ? g.c : g.k;
  const int inner = Tr::kDgrad ? kg : cg, cols = Tr::kDgrad ? cg : kg;
  const int out_h = Tr::kDgrad ? g.h : g.p, out_w = Tr::kDgrad ? g.w : g.q;
  const int positions = ah.rows * aw.rows;
  const int64_t m_total = static_cast<int64_t>(g.n) * positions;
  const int64_t m0 = static_cast<int64_t>(blockIdx.x / p.n_tiles) * Tr::BM;
  const int n0 = static_cast<int>(blockIdx.x % p.n_tiles) * Tr::BN;
  using State = typename Tr::Out::State;
  // Tiles of all stride classes, one class behind the other.
  const int64_t tile_stats =
      (static_cast<int64_t>(cls) * p.m_tiles + blockIdx.x / p.n_tiles) * out_channels + group * cols + n0;
  if (m0 >= m_total) {  // the whole block: a smaller stride class has fewer tiles
    ptx::pdl_wait();    // the kernel before may still use this memory
    if (State::wanted(p.epilogue))
      for (int c = thread; c < Tr::BN && n0 + c < cols; c += Tr::kThreads) State().store(p.epilogue, tile_stats + c);
    return;
  }
  const bool position_major = positions <= kPositionMajorMax;

  ptx::pdl_wait();
  for (int r = thread; r < Tr::BM; r += Tr::kThreads) {
    int64_t m = m0 + r;
    ConvRow row{-1, 0, 0};
    int64_t out = -1;
    if (m < m_total) {
      int64_t quotient;
      int rest;
      divide_rows(m, position_major ? g.n : positions, quotient, rest);
      int pos = position_major ? static_cast<int>(quotient) : rest;
      int n = position_major ? rest : static_cast<int>(quotient);
      int i = pos / aw.rows, j = pos % aw.rows;
      row.image = static_cast<int64_t>(n) * ah.in_size * aw.in_size * in_channels + static_cast<int64_t>(group) * inner;
      row.h = i * ah.mul + ah.off;
      row.w = j * aw.mul + aw.off;
      int64_t pixel =
          (static_cast<int64_t>(n) * out_h + ah.out0 + i * ah.out_stride) * out_w + aw.out0 + j * aw.out_stride;
      out = pixel * out_channels + static_cast<int64_t>(group) * cols;
    }
    rows[r] = row;
    row_out[r] = out;
  }

  // Live taps of the tile: the bounding box over its positions.
  int i0 = 0, i1 = ah.rows - 1, j0 = 0, j1 = aw.rows - 1;
  if (position_major) {
    int64_t last = m0 + Tr::BM < m_total ? m0 + Tr::BM - 1 : m_total - 1;
    int64_t quotient0, quotient1;
    int rest;
    divide_rows(m0, g.n, quotient0, rest);
    divide_rows(last, g.n, quotient1, rest);
    const int pos0 = static_cast<int>(quotient0), pos1 = static_cast<int>(quotient1);
    i0 = pos0 / aw.rows, i1 = pos1 / aw.rows;
    if (i0 == i1) j0 = pos0 % aw.rows, j1 = pos1 % aw.rows;
  }
  int tr0, tr1, ts0, ts1;
  ah.live(i0, i1, tr0, tr1);
  aw.live(j0, j1, ts0, ts1);
  const int live_s = ts1 - ts0;
  const int k_total = (tr1 - tr0) * live_s * inner;
  const SmallDiv by_s(max_int(live_s, 1));
  const int k_tiles = ceil_div(k_total, Tr::BK);
  const int per_split = ceil_div(k_tiles, p.splits);
  const int kt0 = min_int(static_cast<int>(blockIdx.z) * per_split, k_tiles);
  const int kt1 = min_int(kt0 + per_split, k_tiles);
  __syncthreads();  // rows, row_out

  typename Tr::CopyA copy_a(thread);
  typename Tr::CopyB copy_b(thread);
  int prologue_c = 0;  // first channel of this thread's column in the tile now held in registers

  auto split_k = [&](int k, int& tap_r, int& tap_s, int& channel) {
    int tap;
    p.inner.divmod(k, tap, channel);
    by_s.divmod(tap, tap_r, tap_s);
    tap_r += tr0;
    tap_s += ts0;
  };
  auto weight_tap = [&](int tap_r, int tap_s) {
    return (ah.tap0 + tap_r * ah.tap_step) * g.s + aw.tap0 + tap_s * aw.tap_step;
  };
  auto stage_a = [&](int kt) { return smem + (kt - kt0) % Tr::kStages * (Tr::kTileA + Tr::kTileB); };

  auto fetch = [&](int kt) {
    unsigned char* tile_a = stage_a(kt);
    unsigned char* tile_b = tile_a + Tr::kTileA;
    const int k_col = kt * Tr::BK + copy_a.col;
    int tap_r, tap_s, channel;
    split_k(k_col, tap_r, tap_s, channel);
    const bool k_ok = k_col < k_total;
    const int dh = tap_r * ah.step, dw = tap_s * aw.step;
    prologue_c = group * inner + channel;
    copy_a.fetch(tile_a, [&](int row, bool& ok) {
      ConvRow r = rows[row];
      int h = r.h + dh, w = r.w + dw;
      ok = k_ok && r.image >= 0 && static_cast<unsigned>(h) < static_cast<unsigned>(ah.in_size) &&
           static_cast<unsigned>(w) < static_cast<unsigned>(aw.in_size);
      return ok ? p.a + r.image + (h * aw.in_size + w) * in_channels + channel : p.a;
    });
    if constexpr (!Tr::kDgrad) {
      // same column of k as A: one decode serves both
      const T* column = p.b + static_cast<int64_t>(weight_tap(tap_r, tap_s)) * cg + channel;
      copy_b.fetch(tile_b, [&](int row, bool& ok) {
        int n = n0 + row;
        ok = k_ok && n < cols;
        return ok ? column + static_cast<int64_t>(group * kg + n) * (g.r * g.s * cg) : p.b;
      });
    } else {
      const int n = n0 + copy_b.col;
      copy_b.fetch(tile_b, [&](int row, bool& ok) {
        int k = kt * Tr::BK + row, r, s, kout;
        split_k(k, r, s, kout);
        ok = k < k_total && n < cols;
        return ok ? p.b + (static_cast<int64_t>(group * kg + kout) * (g.r * g.s) + weight_tap(r, s)) * cg + n : p.b;
      });
    }
    ptx::cp_async_commit();
  };
  auto commit = [&](int kt) {
    unsigned char* tile_a = stage_a(kt);
    copy_a.commit(tile_a, [&](auto& item) {
      if constexpr (Tr::kPrologue) {
        constexpr int kElems = Tr::CopyA::kElems;
        float x[kElems];
#pragma unroll
        for (int e = 0; e < kElems; ++e)
          x[e] = to_float(item.v[e]) * p.prologue.scale[prologue_c + e] + p.prologue.shift[prologue_c + e];
        activate_all<kElems>(p.prologue.act, x);
#pragma unroll
        for (int e = 0; e < kElems; ++e) item.v[e] = from_float<T>(x[e]);
      }
    });
    copy_b.commit(tile_a + Tr::kTileA, [](auto&) {});
  };

  typename Tr::Engine engine;
  engine.zero();
  const int warp_m = warp / Tr::kWarpsN * Tr::WM, warp_n = warp % Tr::kWarpsN * Tr::WN;
#pragma unroll
  for (int s = 0; s < Tr::kStages - 1; ++s) {
    if (kt0 + s < kt1) {
      fetch(kt0 + s);
      commit(kt0 + s);
    } else {
      ptx::cp_async_commit();  // an empty group keeps the count of pending groups equal for every k-tile
    }
  }
  for (int kt = kt0; kt < kt1; ++kt) {
    ptx::cp_async_wait<Tr::kStages - 2>();
    __syncthreads();  // tile kt is there for all, and all have left tile kt - 1, whose stage is filled next
    const int next = kt + Tr::kStages - 1;
    if (next < kt1) {
      fetch(next);
    } else {
      ptx::cp_async_commit();
    }
    const unsigned char* tile_a = stage_a(kt);
    engine.multiply(tile_a, tile_a + Tr::kTileA, warp_m, warp_n, lane);
    if (next < kt1) commit(next);  // after the math, which hides the latency of the loads
  }
  ptx::pdl_launch_dependents();
  __syncthreads();  // the ring becomes the epilogue's slabs (no copy is pending: the last groups are empty)

  auto* slabs = reinterpret_cast<float*>(smem);
  State* stats = nullptr;
  if (State::wanted(p.epilogue))
    stats = reinterpret_cast<State*>(slabs + Tr::kWarpsM * Tr::kWarpsN * Tr::Out::kSlabFloats);
  TileOutput out{row_out, n0, cols, group * cols, static_cast<int64_t>(blockIdx.z) * p.out_elems, p.vec_out};
  Tr::Out::run(engine, p.epilogue, out, slabs + warp * Tr::Out::kSlabFloats, stats, warp_m, warp_n, lane);
  if (stats) {
    __syncthreads();  // stats
    for (int c = thread; c < Tr::BN && n0 + c < cols; c += Tr::kThreads) {
      State sum = stats[c];
      for (int i = 1; i < Tr::kWarpsM; ++i) sum.add(stats[i * Tr::BN + c]);
      sum.store(p.epilogue, tile_stats + c);
    }
  }
}

template <class Tr>
Status run_conv_gemm(ConvGemmParams<typename Tr::T> p, Stream stream) {
  const ConvShape& g = p.shape;
  const int cg = g.c / g.groups, kg = g.k / g.groups;
  const int classes = Tr::kDgrad ? dgrad_classes(g) : 1;
  const int64_t rows = Tr::kDgrad ? dgrad_class_rows(g) : static_cast<int64_t>(g.n) * g.p * g.q;
  p.inner = FastDiv(Tr::kDgrad ? kg : cg);
  p.h = Tr::kDgrad ? dgrad_axis(g.h, g.p, g.r, g.stride_h, g.pad_h, g.dil_h, 0)
                   : fprop_axis(g.h, g.p, g.r, g.stride_h, g.pad_h, g.dil_h);
  p.w = Tr::kDgrad ? dgrad_axis(g.w, g.q, g.s, g.stride_w, g.pad_w, g.dil_w, 0)
                   : fprop_axis(g.w, g.q, g.s, g.stride_w, g.pad_w, g.dil_w);
  p.n_tiles = ceil_div(Tr::kDgrad ? cg : kg, Tr::BN);
  p.m_tiles = static_cast<int>(ceil_div64(rows, Tr::BM));
  p.out_elems = static_cast<int64_t>(g.n) *
                (Tr::kDgrad ? static_cast<int64_t>(g.h) * g.w * g.c : static_cast<int64_t>(g.p) * g.q * g.k);
  dim3 grid(p.m_tiles * p.n_tiles, classes * g.groups, p.splits);
  return launch(conv_gemm_kernel<Tr>, grid, dim3(Tr::kThreads), Tr::kSmem, stream, p);
}

}  // namespace fastconv
