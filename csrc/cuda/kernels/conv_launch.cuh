// The tiles of the convolution kernels (sizes: shapes.h) and the three functions that the host side calls.
//
// A caller fills ConvProblem, picks a tile and a split count (csrc/cuda/conv2d_config.h knows the machine; nothing here
// asks the device) and provides the fp32 workspace when splits > 1: splits * elements of the result.
#pragma once

#include "conv_gemm.cuh"
#include "conv_reduce.cuh"
#include "conv_wgrad.cuh"
#include "size_limits.h"

namespace fastconv {

template <class T>
struct ConvProblem {
  const T* a;  // fprop: x      dgrad: dy       wgrad: dy
  const T* b;  // fprop: w      dgrad: w        wgrad: x
  ConvShape shape;
  ConvPrologue prologue;     // fprop only; scale null = none
  ConvEpilogue<T> epilogue;  // .out is the result; .partial the workspace when splits > 1
  int tile;                  // index into kConvTiles
  int splits;                // 1 = none
  bool tensor;               // fp32 only: true = TF32 tensor cores, false = exact
  bool keep_parts;  // splits > 1: the sums are left in epilogue.partial, and nothing of the epilogue is applied
};

// The exact fp32 kernels keep three of kConvTiles; others map to the next smaller one.
constexpr ConvTileSize kExactTiles[] = {{16, 64}, {64, 64}, {128, 128}};
constexpr int exact_tile(int tile) { return tile < 2 ? 0 : (tile < 4 ? 1 : 2); }

// clang-format off
template <class T, bool Dgrad, bool Prologue, int Tile> struct TensorTile;
template <class T, bool D, bool P> struct TensorTile<T, D, P, 0> : ConvGemmTraits<T, true, D, P, 16, 64, 16, 16, 128, 4, 16> {};
template <class T, bool D, bool P> struct TensorTile<T, D, P, 1> : ConvGemmTraits<T, true, D, P, 32, 64, 16, 32, 64, 4, 16> {};
template <class T, bool D, bool P> struct TensorTile<T, D, P, 2> : ConvGemmTraits<T, true, D, P, 64, 64, 32, 32, 64, 4, 16> {};
template <class T, bool D, bool P> struct TensorTile<T, D, P, 3> : ConvGemmTraits<T, true, D, P, 128, 64, 64, 32, 64, 4, 16> {};
template <class T, bool D, bool P> struct TensorTile<T, D, P, 4> : ConvGemmTraits<T, true, D, P, 128, 128, 64, 32, 64, 4, 16> {};
template <class T, bool D, bool P> struct TensorTile<T, D, P, 5> : ConvGemmTraits<T, true, D, P, 256, 64, 64, 32, 64, 3, 16> {};
// Channel counts or addresses that 16-byte accesses do not fit: element-wise copies, one tile.
template <class T, bool D, bool P> struct NarrowTile : ConvGemmTraits<T, true, D, P, 64, 64, 32, 32, 64, 2, sizeof(T)> {};
template <bool D, bool P, int Tile> struct ExactTile;
template <bool D, bool P> struct ExactTile<D, P, 0> : ConvGemmTraits<float, false, D, P, 16, 64, 16, 32, 64, 4, 16> {};
template <bool D, bool P> struct ExactTile<D, P, 1> : ConvGemmTraits<float, false, D, P, 64, 64, 32, 32, 64, 3, 16> {};
template <bool D, bool P> struct ExactTile<D, P, 2> : ConvGemmTraits<float, false, D, P, 128, 128, 32, 64, 64, 3, 16> {};
template <bool D, bool P> struct ExactNarrowTile : ConvGemmTraits<float, false, D, P, 64, 64, 32, 32, 64, 2, 4> {};
// clang-format on

template <class T>
bool aligned16(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;  // null is aligned
}

// Whether 16-byte accesses fit rows of `channels` elements (per group: every group must start aligned).
template <class T>
bool fits16(int channels) {
  return channels % kVec16<T> == 0;
}

template <class T>
bool epilogue_aligned(const ConvEpilogue<T>& e) {
  return aligned16(e.out) && aligned16(e.residual) && aligned16(e.preact) && aligned16(e.grad_saved) &&
         aligned16(e.partial) && aligned16(e.norm_x) && aligned16(e.norm_mean) && aligned16(e.norm_invstd) &&
         aligned16(e.norm_weight) && aligned16(e.norm_bias);
}

template <class T>
Status check_conv(const ConvProblem<T>& p, ConvKind kind) {
  const ConvShape& g = p.shape;
  if (g.n < 1 || g.c < 1 || g.k < 1 || g.h < 1 || g.w < 1 || g.p < 1 || g.q < 1)
    return {"conv: empty tensors do not reach the kernels"};
  if (g.groups < 1 || g.c % g.groups || g.k % g.groups) return {"conv: channels are not divisible by groups"};
  if (p.splits < 1 || p.splits > kMostGridYZ) return {"conv: splits must be in [1, 65535]"};
  if (p.splits > 1 && !p.epilogue.partial) return {"conv: a split-K convolution needs a workspace"};
  if (p.splits > 1 && (p.epilogue.stat_mean || p.epilogue.sum_g))
    return {"conv: statistics are not available with split-K"};
  if (p.epilogue.sum_g && !p.epilogue.grad_saved && needs_output(p.epilogue.act))
    return {"conv: this activation needs its output"};
  if (p.epilogue.sum_g && kind != kDgrad) return {"conv: sums of gradients are of a data gradient"};
  return {conv_limit(g, kind)};
}

template <class T, bool Dgrad, bool Prologue>
Status dispatch_conv_gemm(const ConvProblem<T>& problem, ConvGemmParams<T> p, bool vec, Stream stream) {
  if constexpr (std::is_same_v<T, float>) {
    if (!problem.tensor) {
      if (!vec) return run_conv_gemm<ExactNarrowTile<Dgrad, Prologue>>(p, stream);
      switch (exact_tile(problem.tile)) {
        case 0:
          return run_conv_gemm<ExactTile<Dgrad, Prologue, 0>>(p, stream);
        case 1:
          return run_conv_gemm<ExactTile<Dgrad, Prologue, 1>>(p, stream);
        default:
          return run_conv_gemm<ExactTile<Dgrad, Prologue, 2>>(p, stream);
      }
    }
  }
  if (!vec) return run_conv_gemm<NarrowTile<T, Dgrad, Prologue>>(p, stream);
  switch (problem.tile) {
    case 0:
      return run_conv_gemm<TensorTile<T, Dgrad, Prologue, 0>>(p, stream);
    case 1:
      return run_conv_gemm<TensorTile<T, Dgrad, Prologue, 1>>(p, stream);
    case 2:
      return run_conv_gemm<TensorTile<T, Dgrad, Prologue, 2>>(p, stream);
    case 3:
      return run_conv_gemm<TensorTile<T, Dgrad, Prologue, 3>>(p, stream);
    case 4:
      return run_conv_gemm<TensorTile<T, Dgrad, Prologue, 4>>(p, stream);
    case 5:
      return run_conv_gemm<TensorTile<T, Dgrad, Prologue, 5>>(p, stream);
    default:
      return {"conv: tile must be in [0, 6)"};
  }
}

// Whether 16-byte copies fit both operands.
template <class T, bool Dgrad>
bool conv_vec(const ConvProblem<T>& p) {
  const ConvShape& g = p.shape;
  return fits16<T>(g.c / g.groups) && (!Dgrad || fits16<T>(g.k / g.groups)) && aligned16(p.a) && aligned16(p.b);
}

// Rows of the tile that will really run: what the reader of the sums over rows must know, [ceil(npq / rows), k] in
// fprop, [dgrad_classes * ceil(dgrad_class_rows / rows), c] in dgrad.
template <class T, bool Dgrad>
int conv_tile_rows(const ConvProblem<T>& p) {
  if (!conv_vec<T, Dgrad>(p)) return 64;
  bool exact = std::is_same_v<T, float> && !p.tensor;
  return exact ? kExactTiles[exact_tile(p.tile)].bm : kConvTiles[p.tile].bm;
}

template <class T, bool Dgrad>
Status launch_conv_gemm(const ConvProblem<T>& problem, Stream stream) {
  Status status = check_conv(problem, Dgrad ? kDgrad : kFprop);
  if (!status.ok()) return status;
  const ConvShape& g = problem.shape;
  const int cg = g.c / g.groups, kg = g.k / g.groups, out_channels = Dgrad ? g.c : g.k;
  ConvGemmParams<T> p{};
  p.a = problem.a, p.b = problem.b, p.shape = g;
  p.prologue = problem.prologue, p.epilogue = problem.epilogue, p.splits = problem.splits;
  const bool vec = conv_vec<T, Dgrad>(problem);
  p.vec_out = fits16<T>(Dgrad ? cg : kg) && epilogue_aligned(p.epilogue);
  if (p.splits == 1) p.epilogue.partial = nullptr;
  if constexpr (!Dgrad) {
    status = p.prologue.scale ? dispatch_conv_gemm<T, false, true>(problem, p, vec, stream)
                              : dispatch_conv_gemm<T, false, false>(problem, p, vec, stream);
  } else {
    status = dispatch_conv_gemm<T, true, false>(problem, p, vec, stream);
  }
  if (!status.ok() || p.splits == 1 || problem.keep_parts) return status;
  int64_t elems = Dgrad ? static_cast<int64_t>(g.n) * g.h * g.w * g.c : static_cast<int64_t>(g.n) * g.p * g.q * g.k;
  return run_conv_reduce(problem.epilogue, p.splits, elems, out_channels, p.vec_out, stream);
}

// y = epilogue(conv(prologue(x), w)).
template <class T>
Status launch_conv_fprop(const ConvProblem<T>& problem, Stream stream) {
  return launch_conv_gemm<T, false>(problem, stream);
}

// dx = epilogue(conv_transpose(dy, w)); epilogue.grad_saved fuses the backward of the activation that made x.
template <class T>
Status launch_conv_dgrad(const ConvProblem<T>& problem, Stream stream) {
  return launch_conv_gemm<T, true>(problem, stream);
}

// clang-format off
template <class T, bool Tensor, int Tile, int VA, int VB> struct WgradTile;
template <class T, bool X, int VA, int VB> struct WgradTile<T, X, 0, VA, VB> : ConvWgradTraits<T, X, 64, 64, 32, 32, 64, 4, VA, VB> {};
template <class T, bool X, int VA, int VB> struct WgradTile<T, X, 1, VA, VB> : ConvWgradTraits<T, X, 128, 128, 64, 32, 64, 4, VA, VB> {};
// clang-format on

template <class T, bool Tensor>
Status dispatch_conv_wgrad(int tile, const ConvWgradParams<T>& p, bool vec_a, bool vec_b, Stream stream) {
  constexpr int kOne = static_cast<int>(sizeof(T));
  if (vec_a && vec_b)
    return tile == 0 ? run_conv_wgrad<WgradTile<T, Tensor, 0, 16, 16>>(p, stream)
                     : run_conv_wgrad<WgradTile<T, Tensor, 1, 16, 16>>(p, stream);
  if (vec_a) return run_conv_wgrad<WgradTile<T, Tensor, 0, 16, kOne>>(p, stream);  // the stem: c = 3, k = 64
  return run_conv_wgrad<WgradTile<T, Tensor, 0, kOne, kOne>>(p, stream);
}

// dw = sum over positions of dy x; epilogue.out = dw [k, r, s, c / groups].
template <class T>
Status launch_conv_wgrad(const ConvProblem<T>& problem, Stream stream) {
  Status status = check_conv(problem, kWgrad);
  if (!status.ok()) return status;
  if (problem.tile < 0 || problem.tile >= kWgradTileCount) return {"conv_wgrad: tile must be in [0, 2)"};
  const ConvShape& g = problem.shape;
  const int cg = g.c / g.groups;
  ConvWgradParams<T> p{};
  p.dy = problem.a, p.x = problem.b, p.shape = g, p.epilogue = problem.epilogue, p.splits = problem.splits;
  if (p.splits == 1) p.epilogue.partial = nullptr;
  bool vec_a = fits16<T>(g.k / g.groups) && aligned16(p.dy), vec_b = fits16<T>(cg) && aligned16(p.x);
  p.vec_out = fits16<T>(g.r * g.s * cg) && epilogue_aligned(p.epilogue);
  if constexpr (std::is_same_v<T, float>) {
    status = problem.tensor ? dispatch_conv_wgrad<T, true>(problem.tile, p, vec_a, vec_b, stream)
                            : dispatch_conv_wgrad<T, false>(problem.tile, p, vec_a, vec_b, stream);
  } else {
    status = dispatch_conv_wgrad<T, true>(problem.tile, p, vec_a, vec_b, stream);
  }
  if (!status.ok() || p.splits == 1 || problem.keep_parts) return status;
  return run_conv_reduce(problem.epilogue, p.splits, static_cast<int64_t>(g.k) * g.r * g.s * cg, g.r * g.s * cg,
                         p.vec_out, stream);
}

}  // namespace fastconv
