// Convolution weight gradient.
//
//   dw[k,r,s,c] = sum_{n,p,q} dy[n,p,q,k] x[n,h,w,c],   h = p stride - pad + r dil (w likewise)
//
// GEMM view: rows = k, columns = (r,s,c) flattened, K = output positions. Both operands are MN-major as they lie in
// memory (ldmatrix.trans); nothing is transposed. For d y = w * x, every (n,p,q) adds dy[k] x[c at its tap] to dw: the
// sum above. Mapping: block = BM x BN of dw; grid.x = tiles, grid.y = groups, grid.z = K splits. The taps of a tile's
// columns bound the positions that see data: only those are summed (a 3x3 filter on a 1x1 map costs 1/9), and a tile
// whose taps are all dead runs no k-tile and writes exact zeros. Splits write fp32 partial sums that conv_reduce adds
// in a fixed order: the result does not depend on timing. Accumulation: fp32. FLOPs 2 n p q k r s c (live taps); least
// bytes: x, dy, dw once.
#pragma once

#include "conv_engine.cuh"
#include "conv_epilogue.cuh"
#include "launch.cuh"

namespace fastconv {

template <class T>
struct ConvWgradParams {
  const T* dy;
  const T* x;
  ConvShape shape;
  ConvEpilogue<T> epilogue;  // out = dw, or partial
  FastDiv by_p, by_q;        // by the output's sizes
  int n_tiles;
  int splits;
  int64_t out_elems;
  bool vec_out;
};

template <class T_, bool Tensor_, int BM_, int BN_, int WM_, int WN_, int KBytes_, int Stages_, int VecBytesA_,
          int VecBytesB_>
struct ConvWgradTraits {
  using T = T_;
  static constexpr int BM = BM_, BN = BN_, WM = WM_, WN = WN_, kKBytes = KBytes_, kStages = Stages_;
  static constexpr int kElem = static_cast<int>(sizeof(T));
  static constexpr int BK = kKBytes / kElem;
  static constexpr int kWarpsM = BM / WM, kWarpsN = BN / WN;
  static constexpr int kThreads = kWarpsM * kWarpsN * kWarp;
  static constexpr int kTileA = BM * kKBytes, kTileB = BN * kKBytes;
  static_assert(BM % WM == 0 && BN % WN == 0, "warps tile the block");
  static_assert(kThreads <= 1024 && kStages >= 2, "block size and ring");
  static constexpr int kRegisters = BM * BN / kThreads + 64 + (kElem == 4 ? 32 : 0) + (VecBytesB_ < 16 ? 64 : 0) +
                                    (VecBytesA_ < 16 ? 64 : 0) + (Tensor_ ? 0 : 32);
  static constexpr int kMinBlocks = min_int(max_int(65536 / (kThreads * kRegisters), 1), 8);  // as in conv_gemm.cuh
  using Engine = std::conditional_t<Tensor_, TensorEngine<T, WM, WN, kKBytes, true, true, BM, BN>,
                                    SimtEngine<T, WM, WN, kKBytes, true, true, BM, BN>>;
  using CopyA = TileCopy<T, BK, BM * kElem, VecBytesA_, kThreads, VecBytesA_ >= 4, kElem == 4>;
  using CopyB = TileCopy<T, BK, BN * kElem, VecBytesB_, kThreads, VecBytesB_ >= 4, kElem == 4>;
  using Out = Epilogue<Engine, T, BN, ColumnSums::kNone>;
  static constexpr int kRing = kStages * (kTileA + kTileB);
  static constexpr int kSlabs = kWarpsM * kWarpsN * Out::kSlabFloats * 4;
  static constexpr int kMain = ((kRing > kSlabs ? kRing : kSlabs) + 15) / 16 * 16;
  static constexpr int kSmem = kMain + BM * 8;
};

template <class Tr>
__global__ void __launch_bounds__(Tr::kThreads, Tr::kMinBlocks) conv_wgrad_kernel(ConvWgradParams<typename Tr::T> p) {
  DYN_SMEM(smem);
  auto* row_out = reinterpret_cast<int64_t*>(smem + Tr::kMain);
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const ConvShape& g = p.shape;
  const int group = blockIdx.y, cg = g.c / g.groups, kg = g.k / g.groups;
  const int m0 = static_cast<int>(blockIdx.x / p.n_tiles) * Tr::BM;
  const int n0 = static_cast<int>(blockIdx.x % p.n_tiles) * Tr::BN;
  const int cols = g.r * g.s * cg;

  ptx::pdl_wait();
  for (int r = thread; r < Tr::BM; r += Tr::kThreads)  // read after the barriers of the k-loop's end
    row_out[r] = m0 + r < kg ? static_cast<int64_t>(group * kg + m0 + r) * cols : -1;

  // Positions that any tap of these columns can use: a box in (p, q).
  const int tap0 = n0 / cg, tap1 = (min_int(n0 + Tr::BN, cols) - 1) / cg;
  const int r0 = tap0 / g.s, r1 = tap1 / g.s;
  const int s0 = r0 == r1 ? tap0 % g.s : 0, s1 = r0 == r1 ? tap1 % g.s : g.s - 1;
  const int p0 = max_int(0, -floor_div(r1 * g.dil_h - g.pad_h, g.stride_h));
  const int p1 = min_int(g.p - 1, floor_div(g.h - 1 + g.pad_h - r0 * g.dil_h, g.stride_h));
  const int q0 = max_int(0, -floor_div(s1 * g.dil_w - g.pad_w, g.stride_w));
  const int q1 = min_int(g.q - 1, floor_div(g.w - 1 + g.pad_w - s0 * g.dil_w, g.stride_w));
  const int np = max_int(p1 - p0 + 1, 0), nq = max_int(q1 - q0 + 1, 0);
  const int64_t k_total = static_cast<int64_t>(g.n) * np * nq;
  // Most tiles use all positions; a divisor of their own costs the others a 64-bit division.
  const FastDiv by_q = nq == g.q ? p.by_q : FastDiv(max_int(nq, 1)),
                by_p = np == g.p ? p.by_p : FastDiv(max_int(np, 1));
  const int k_tiles = static_cast<int>(ceil_div64(k_total, Tr::BK));
  const int per_split = ceil_div(k_tiles, p.splits);
  const int kt0 = min_int(static_cast<int>(blockIdx.z) * per_split, k_tiles);
  const int kt1 = min_int(kt0 + per_split, k_tiles);

  typename Tr::CopyA copy_a(thread);
  typename Tr::CopyB copy_b(thread);
  const int a_k = m0 + copy_a.col, b_col = n0 + copy_b.col;
  const bool a_ok = a_k < kg, b_ok = b_col < cols;
  const int b_tap = b_ok ? b_col / cg : 0;  // this thread's column never leaves its tap
  const int b_c = b_col - b_tap * cg + group * cg;
  const int b_dh = b_tap / g.s * g.dil_h - g.pad_h, b_dw = b_tap % g.s * g.dil_w - g.pad_w;

  auto position = [&](int k, int& n, int& i, int& j) {
    int t;
    by_q.divmod(k, t, j);
    by_p.divmod(t, n, i);
    i += p0;
    j += q0;
  };
  auto stage_a = [&](int kt) { return smem + (kt - kt0) % Tr::kStages * (Tr::kTileA + Tr::kTileB); };
  auto fetch = [&](int kt) {
    unsigned char* tile_a = stage_a(kt);
    copy_a.fetch(tile_a, [&](int row, bool& ok) {
      int k = kt * Tr::BK + row, n, i, j;
      position(k, n, i, j);
      ok = a_ok && k < k_total;
      return ok ? p.dy + (static_cast<int64_t>(n) * g.p * g.q + i * g.q + j) * g.k + group * kg + a_k : p.dy;
    });
    copy_b.fetch(tile_a + Tr::kTileA, [&](int row, bool& ok) {
      int k = kt * Tr::BK + row, n, i, j;
      position(k, n, i, j);
      int h = i * g.stride_h + b_dh, w = j * g.stride_w + b_dw;
      ok = b_ok && k < k_total && static_cast<unsigned>(h) < static_cast<unsigned>(g.h) &&
           static_cast<unsigned>(w) < static_cast<unsigned>(g.w);
      return ok ? p.x + (static_cast<int64_t>(n) * g.h * g.w + h * g.w + w) * g.c + b_c : p.x;
    });
    ptx::cp_async_commit();
  };
  auto commit = [&](int kt) {
    unsigned char* tile_a = stage_a(kt);
    copy_a.commit(tile_a, [](auto&) {});
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
      ptx::cp_async_commit();  // keeps the count of pending groups equal for every k-tile
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
    if (next < kt1) commit(next);
  }
  ptx::pdl_launch_dependents();
  __syncthreads();  // the ring becomes the epilogue's slabs (no copy is pending: the last groups are empty)

  TileOutput out{row_out, n0, cols, 0, static_cast<int64_t>(blockIdx.z) * p.out_elems, p.vec_out};
  Tr::Out::run(engine, p.epilogue, out, reinterpret_cast<float*>(smem) + warp * Tr::Out::kSlabFloats, nullptr, warp_m,
               warp_n, lane);
}

template <class Tr>
Status run_conv_wgrad(ConvWgradParams<typename Tr::T> p, Stream stream) {
  const ConvShape& g = p.shape;
  const int cg = g.c / g.groups, kg = g.k / g.groups;
  p.by_p = FastDiv(g.p), p.by_q = FastDiv(g.q);
  p.n_tiles = ceil_div(g.r * g.s * cg, Tr::BN);
  int64_t tiles = static_cast<int64_t>(ceil_div(kg, Tr::BM)) * p.n_tiles;
  p.out_elems = static_cast<int64_t>(g.k) * g.r * g.s * cg;
  dim3 grid(static_cast<unsigned>(tiles), g.groups, p.splits);
  return launch(conv_wgrad_kernel<Tr>, grid, dim3(Tr::kThreads), Tr::kSmem, stream, p);
}

}  // namespace fastconv
