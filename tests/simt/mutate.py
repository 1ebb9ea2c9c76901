"""Proves the net: breaks the kernels on purpose, one fault at a time, and expects the emulator's tests to turn red.

    python tests/simt/mutate.py [--only SUBSTRING ...] [--minutes M] [--part I/N] [--again] [--write]

Two kinds of fault. Every barrier, warp barrier, cp.async wait and commit of the kernels is skipped in turn, at run
time (FASTCONV_SIMT_SKIP, no rebuild). Then the edits of EDITS, each in a copy of the kernels: a dropped bound, a wrong
swizzle, ...
Verdicts are kept in build/simt by the content of the kernels and tests that they were made with, so that a run which
stops (--minutes) is taken up by the next one, and parts (--part 1/2, 2/2) can run side by side.
Prints one line per fault and the score; exits 1 if a fault survives that is not listed, with its reason, in EQUIVALENT,
3 where faults are left for another run. --write: mutation.md, with what is judged so far.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, NamedTuple

import pytest
import simt_lib
import torch

FAMILY_OF = {
    "act_backward": "norm",
    "batch_norm": "norm",
    "batch_norm_backward": "norm",
    "batch_norm_fold": "norm",
    "norm": "norm",  # csrc/cuda/norm.cu and its neighbours
    "column_tile": "norm",
    "pool": "pool",
    "cross_entropy": "loss",
    "cross_entropy_backward": "loss",
    "loss": "loss",
    "update": "update",
}  # everything else: conv
TIMEOUT = 240  # seconds for one family's tests, which take less than a minute and a half: a fault may hang them
torch.set_num_threads(1)  # a fork must not inherit a pool of threads
SITE = re.compile(r"__syncthreads\(\)|__syncwarp\(\)|cp_async_wait<[^>]*>\(\)|cp_async_commit\(\)")

# (file, text, replacement[, how]): each must occur in the file; the first occurrence is replaced. how: "full" where only
# the library with fp32 can see it, or the family of tests that looks at a file which several use.
EDITS = [
    ("conv_tile.cuh", "if constexpr (kChunks >= 8) return row & 7;", "if constexpr (kChunks >= 8) return 0;"),
    ("conv_tile.cuh", "return (row >> 1) & 3;", "return row & 3;"),
    (
        "conv_tile.cuh",
        "ptx::cp_async<VecBytes>(at(tile, row, col), p, ok)",
        "ptx::cp_async<VecBytes>(at(tile, row, col), p, true)",
    ),
    ("conv_tile.cuh", "if (valid >> i & 1) transform(held[i]);", "transform(held[i]);"),
    ("conv_tile.cuh", "          valid |= 1u << i;", ""),
    ("conv_gemm.cuh", "ok = k_ok && r.image >= 0 &&", "ok = r.image >= 0 &&"),
    ("conv_gemm.cuh", "ok = k_ok && r.image >= 0 &&", "ok = k_ok &&"),
    ("conv_gemm.cuh", "static_cast<unsigned>(h) < static_cast<unsigned>(ah.in_size) &&", ""),
    ("conv_gemm.cuh", "static_cast<unsigned>(w) < static_cast<unsigned>(aw.in_size);", "true;"),
    ("conv_gemm.cuh", "ok = k_ok && n < cols;", "ok = k_ok;"),
    ("conv_gemm.cuh", "ok = k < k_total && n < cols;", "ok = k < k_total;"),
    ("conv_gemm.cuh", "ok = k < k_total && n < cols;", "ok = n < cols;"),
    ("conv_gemm.cuh", "if (m < m_total) {", "if (true) {"),
    ("conv_gemm.cuh", "if (m0 >= m_total) return;", ""),
    ("conv_gemm.cuh", "Tr::kStages - 2>()", "Tr::kStages - 1>()"),
    ("conv_gemm.cuh", "const int next = kt + Tr::kStages - 1;", "const int next = kt + Tr::kStages;"),
    ("conv_gemm.cuh", "const int kt1 = min_int(kt0 + per_split, k_tiles);", "const int kt1 = kt0 + per_split;"),
    ("conv_gemm.cuh", "if (i0 == i1) j0", "j0"),
    ("conv_gemm.cuh", "m = merge(m, stats[i * Tr::BN + c]);", "m = stats[i * Tr::BN + c];"),
    ("conv_gemm.cuh", "if (next < kt1) commit(next);", "commit(next);"),
    ("conv_wgrad.cuh", "Tr::kStages - 2>()", "Tr::kStages - 1>()"),
    ("conv_wgrad.cuh", "ok = a_ok && k < k_total;", "ok = a_ok;"),
    ("conv_wgrad.cuh", "ok = a_ok && k < k_total;", "ok = k < k_total;"),
    ("conv_wgrad.cuh", "ok = b_ok && k < k_total &&", "ok = b_ok &&"),
    ("conv_wgrad.cuh", "static_cast<unsigned>(w) < static_cast<unsigned>(g.w);", "true;"),
    ("conv_wgrad.cuh", "m0 + r < kg ?", "true ?"),
    ("conv_params.cuh", "j0 = max_int(first, 0);", "j0 = max_int(first + 1, 0);"),
    ("conv_params.cuh", "min_int(last + 1, taps)", "min_int(last, taps)"),
    ("conv_params.cuh", "stride / gcd_int(stride, dil)", "stride"),
    ("conv_epilogue.cuh", "if (row >= 0 && col < o.cols) write<kVec>", "if (row >= 0) write<kVec>"),
    ("conv_epilogue.cuh", "if (row >= 0 && col < o.cols) write<1>", "if (row >= 0) write<1>"),
    ("conv_epilogue.cuh", "staged[i] = to_float(from_float<T>(x[i]));", "staged[i] = x[i];"),
    (
        "conv_epilogue.cuh",
        "m.mean += stage[r * kLd + c], m.count += 1.0f;",
        "m.mean += stage[r * kLd + c], m.count = 16.0f;",
    ),
    ("conv_engine.cuh", "r[i] = ptx::to_tf32(x);", "", "full"),
    ("conv_engine.cuh", "(mn & 3) * 4);", "(mn & 2) * 4);", "full"),
    ("conv_engine.cuh", "i * lanes + l;", "i * lanes;", "full"),
    ("conv_engine.cuh", "(m + (lane & 15), kk * 2 + (lane >> 4))", "(m + (lane & 15), kk * 2)"),
    ("conv_engine.cuh", "kk * 2 + (lane >> 3 & 1)));", "kk * 2));"),
    ("conv_engine.cuh", "if (ii != i) continue;", ""),
    ("conv_engine.cuh", "if (s != slab) continue;", "", "full"),
    ("conv_epilogue.cuh", "if (m.count > 0.0f) m.mean /= m.count;", "m.mean /= m.count;"),
    ("conv_launch.cuh", "!Dgrad || fits16<T>(kg)", "true"),
    ("conv_launch.cuh", "&& aligned16(p.a) && aligned16(p.b);\n  p.vec_out", ";\n  p.vec_out"),
    ("conv_launch.cuh", "p.vec_out = fits16<T>(Dgrad ? cg : kg) &&", "p.vec_out ="),
    ("conv_launch.cuh", "p.vec_out = fits16<T>(g.r * g.s * cg) &&", "p.vec_out ="),
    ("conv_launch.cuh", "if (!vec) return 64;", ""),
    ("conv_launch.cuh", "Dgrad ? static_cast<int64_t>(g.n) * g.h * g.w * g.c :", "false ? 0 :"),
    ("conv_launch.cuh", "aligned16(p.dy), vec_b", "true, vec_b"),
    ("conv_launch.cuh", "return tile < 2 ? 0 :", "return tile < 2 ? 1 :", "full"),
    (
        "conv_launch.cuh",
        "if (p.splits == 1) p.epilogue.partial = nullptr;\n  if constexpr (!Dgrad)",
        "if constexpr (!Dgrad)",
    ),
    ("conv_launch.cuh", "p.prologue.scale ? dispatch", "false ? dispatch"),
    ("conv_wgrad.cuh", "p.out_elems = static_cast<int64_t>(g.k) * g.r * g.s * cg;", "p.out_elems = 0;"),
    ("conv_gemm.cuh", "classes = min_int(g.stride_h, g.h) *", "classes = g.stride_h *"),
    ("conv_gemm.cuh", "rows_h = ceil_div(g.h, g.stride_h)", "rows_h = g.h / g.stride_h"),
    ("conv_depthwise.cuh", "vec = vec && reinterpret_cast<uintptr_t>(q) % 16 == 0;", ";"),
    ("conv_depthwise.cuh", "if (p.splits == 1) p.epilogue.partial = nullptr;", ""),
    ("conv_depthwise.cuh", "if (Dgrad) { if (iw % g.stride_w) continue;", "if (Dgrad) {"),
    ("conv_depthwise.cuh", "x[j] = to_float(from_float<T>(x[j]));", ";", "full"),
    ("../launch_conv.cuh", "case kDgrad: return launch_conv_dgrad(p, stream);", "case kDgrad: return {};"),
    (
        "../launch_conv.cuh",
        "return launch_depthwise<T, true>(d, stream);",
        "return launch_depthwise<T, false>(d, stream);",
    ),
    ("../launch_conv.cuh", "c.scale, c.shift, static_cast", "c.shift, c.scale, static_cast"),
    ("../launch_conv.cuh", "p.prologue = {c.pro_scale, c.pro_shift,", "p.prologue = {c.pro_scale, c.pro_scale,"),
    ("../launch_conv.cuh", "p.tensor = c.tensor != 0;", "p.tensor = true;", "full"),
    ("../launch_dtype.cuh", "case 2: return f(__nv_bfloat16{})", "case 2: return f(__half{})", "norm"),
    ("../launch_dtype.cuh", "return f(float{}).message;", "f(float{}); return {};", "norm"),
    ("../norm.cu", "{c.running_mean, running}", "{c.running_mean, params}"),
    ("../norm.cu", "c.training != 0, c.momentum", "true, c.momentum"),
    ("../norm.cu", "act_backward_vec(p, c.channels) ? kVec16<T> : 1", "kVec16<T>"),
    ("../norm.cu", "batch_norm_vec(p, c.channels) ? kVec16<T> : 1", "kVec16<T>"),
    ("../norm.cu", "batch_norm_backward_vec(p, c.channels) ? kVec16<T> : 1", "kVec16<T>"),
    ("../norm.cu", "{c.conv_bias, c.conv_bias_float != 0}", "{c.conv_bias, true}"),
    ("../norm.cu", "return max_int(column_chunks(", "return min_int(column_chunks("),
    ("../pool.cu", "c.offsets, c.shape", "nullptr, c.shape"),
    ("../loss.cu", "static_cast<const uint8_t*>(c.target_u8),", "nullptr,"),
    ("../loss.cu", "c.ignore_index, c.smoothing,", "c.ignore_index, 0.0f,"),
    ("../loss.cu", "static_cast<T*>(c.grad_probabilities)", "nullptr"),
    ("conv_reduce.cuh", "for (int s = 1; s < splits; ++s)", "for (int s = 2; s < splits; ++s)"),
    ("conv_depthwise.cuh", "if (ih % g.stride_h) continue;", ""),
    ("conv_depthwise.cuh", "if (c >= g.c || ", "if ("),
    ("common.cuh", "delta * delta * a.count * share", "0.0f", "norm"),
    ("common.cuh", "if (n == 0.0f) return {0.0f, 0.0f, 0.0f};", ""),
    ("column_tile.cuh", "int64_t most = ceil_div64(rows, min_rows);", "int64_t most = chunks;"),
    ("column_tile.cuh", "end = active ?", "end = true ?"),
    ("act_backward.cuh", "if (c < channels)", "if (true)"),
    ("batch_norm.cuh", "dev[j] = m2[j] + d * d * mine;", "dev[j] = m2[j];"),
    (
        "batch_norm.cuh",
        "float count = static_cast<float>(left < p.shape.chunk_rows ? left : p.shape.chunk_rows);",
        "float count = static_cast<float>(p.shape.chunk_rows);",
    ),
    ("batch_norm.cuh", "x[j] -= pivot[j];", ""),
    ("batch_norm.cuh", "if (p.pivoted) m.mean +=", "m.mean +="),
    ("batch_norm.cuh", "if (p.pivoted) m.mean += to_float(p.x[c]);", ""),
    ("batch_norm.cuh", "mean[j] += pivot[j];", ""),
    ("batch_norm.cuh", "load_floats<N>(pivot, p.x + t.c);", ""),
    ("batch_norm.cuh", "if (!t.active) return;\n  if (Split)", "if (Split)"),
    ("batch_norm.cuh", "merged.pivoted = part_rows == 0;", "merged.pivoted = true;"),
    ("batch_norm.cuh", "if (part_rows > 0) merged.shape.chunk_rows = part_rows;", ""),
    ("batch_norm.cuh", "fmaf(x[j] - mean[j], scale[j], bias[j])", "fmaf(x[j], scale[j], bias[j] - mean[j] * scale[j])"),
    ("batch_norm.cuh", "part_rows == 0 && p.shape.rows <= kBatchNormSmallRows && p.momentum >= 0.0f", "part_rows == 0"),
    (
        "batch_norm.cuh",
        "p.momentum >= 0.0f ? p.momentum : 1.0f / static_cast<float>(*p.batches_tracked + 1)",
        "p.momentum",
    ),
    ("batch_norm.cuh", "blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) ++", "threadIdx.x == 0) ++"),
    ("batch_norm.cuh", "p.shape.chunk_rows = p.shape.rows;", ""),
    ("batch_norm_backward.cuh", "p.shape.chunk_rows = p.shape.rows;", ""),
    ("batch_norm_backward.cuh", "if (p.residual) load_floats", "if (false) load_floats"),
    ("batch_norm_backward.cuh", "(p.training && p.dx)", "p.dx"),
    ("batch_norm_backward.cuh", "bool sums = p.dweight.data || p.dbias.data || p.dresidual ||", "bool sums ="),
    ("batch_norm_fold.cuh", "if (c >= p.channels) return;", ""),
    ("batch_norm_fold.cuh", "p.conv_bias.get<T>(c, 0.0f) - mean", "-mean"),
    ("batch_norm_fold.cuh", "get<T>(c, 1.0f) + p.eps", "get<T>(c, 1.0f)"),
    ("act_backward.cuh", "bits % 16 == 0 && channels", "channels"),
    ("act_backward.cuh", "if (t.y == 0 && t.active) store_floats", "if (t.y == 0) store_floats"),
    ("batch_norm.cuh", "factor * m2 / (rows - 1.0f)", "factor * m2 / rows"),
    ("batch_norm_backward.cuh", "const float share = p.training ?", "const float share = true ?"),
    ("batch_norm_backward.cuh", "p.act = Activation::kIdentity;\n", "\n"),
    ("pool.cuh", "x[j] > best[j] ||", "x[j] >= best[j] ||"),
    ("pool.cuh", "|| x[j] != x[j])", ")"),
    ("pool.cuh", "where[j] < 0 || ", ""),
    ("pool.cuh", "min_int(v.h0 + g.r, g.h + g.pad_h)", "v.h0 + g.r"),
    ("pool.cuh", "if (ph < 0 || ph % g.stride_h ||", "if (ph < 0 ||"),
    ("pool.cuh", "if (!g.count_include_pad) area", "area"),
    ("pool.cuh", "qw < 0 || qw % g.stride_w ||", "qw < 0 ||"),
    ("pool.cuh", "offsets.v[j] == r * g.s + s ?", "true ?"),
    ("pool.cuh", "% 16 == 0 && reinterpret_cast<uintptr_t>(p.offsets) % kN == 0;", "% 16 == 0;"),
    ("pool.cuh", "p0 = max_int(floor_div(h + g.pad_h - g.r, g.stride_h) + 1, 0)", "p0 = 0"),
    ("pool.cuh", "min_int((h + g.pad_h) / g.stride_h + 1, g.p)", "(h + g.pad_h) / g.stride_h + 1"),
    ("column_tile.cuh", "for (int i = 1; i < s.splits; ++i) {", "for (int i = 1; i < s.splits - 1; ++i) {"),
    ("column_tile.cuh", "s.parts + i * s.elements + at", "s.parts + i * s.elements"),
    ("column_tile.cuh", "if (s.addend) load_floats", "if (false) load_floats"),
    ("column_tile.cuh", "x[j] + s.bias.template get<T>(c + j, 0.0f) + addend[j]", "x[j] + addend[j]"),
    ("column_tile.cuh", "to_float(from_float<T>(x[j] + s.bias", "((float)(x[j] + s.bias"),
    ("column_tile.cuh", "if (keep) store_floats<N>(s.into + at, x);", ""),
    ("update.cuh", "s < t.splits; ++s", "s < t.splits - 1; ++s"),
    ("update.cuh", "(t.splits == 1 || t.elements % kUpdateVector == 0)", "true"),
    ("update.cuh", "p.first_block[middle] <= block", "p.first_block[middle] < block"),
    ("update.cuh", "return t.live == kAllLive ||", "return true ||"),
    ("update.cuh", "at / t.inner % t.taps", "at % t.taps"),
    ("update.cuh", "(t.live == kAllLive || t.inner % kUpdateVector == 0)", "true"),
    ("update.cuh", "words % 16 == 0 && grad == 0 &&", "grad == 0 &&"),
    ("update.cuh", "begin + kUpdateChunk < t.elements ? begin + kUpdateChunk : t.elements", "begin + kUpdateChunk"),
    ("update.cuh", "(end - begin) / kUpdateVector * kUpdateVector", "(end - begin)"),
    ("update.cuh", "at < end; at += kUpdateThreads)", "at < whole; at += kUpdateThreads)"),
    ("update.cuh", "if (t.elements == 0) continue;", ""),
    ("update.cuh", "w[i] *= r.keep;", ""),
    ("update.cuh", "d[i] += w[i] * r.l2;", ""),
    ("update.cuh", "r.nesterov != 0.0f ?", "true ?"),
    ("update.cuh", "p.count < kUpdateTensors; ++at", "p.count < count; ++at"),
    ("cross_entropy.cuh", "sum * expf(max - x)", "sum"),
    ("cross_entropy.cuh", ": sum_wx - (now - before) * sum_w;", ": sum_wx;"),
    ("cross_entropy.cuh", "before == now || before == -INFINITY ? sum_wx", "before == now ? sum_wx"),
    ("cross_entropy.cuh", "sum_wx = shift_sum(sum_wx, sum_w, mine, l.max);", ""),
    ("cross_entropy.cuh", "shift_sum(sum_wx, sum_w, before, l.max));", "sum_wx);"),
    ("cross_entropy.cuh", "max == -INFINITY ? x : x - max;", "x - max;"),
    (
        "cross_entropy.cuh",
        "log_sum - (to_float(p.input[base + t * s.stride_c]) - l.max)",
        "l.value() - to_float(p.input[base + t * s.stride_c])",
    ),
    ("cross_entropy.cuh", "sum += x == max ? 1.0f : expf(x - max);", "sum += expf(x - max);"),
    ("cross_entropy.cuh", "other_max == m ? other_sum :", "false ? 0.0f :"),
    ("cross_entropy.cuh", "return max == INFINITY ? NAN :", "return false ? NAN :"),
    ("cross_entropy.cuh", "l.max == INFINITY ? NAN : logf", "false ? NAN : logf"),
    ("cross_entropy.cuh", "if (thread != 0) return;", ""),
    ("cross_entropy.cuh", "s.stride_d % kVec16<T> == 0 && address_bits % 16 == 0;", "s.stride_d % kVec16<T> == 0;"),
    ("cross_entropy.cuh", "s.classes % kVec16<T> == 0 && s.stride_n", "s.stride_n"),
    ("cross_entropy_backward.cuh", "scale = 1.0f / row_sum<Lanes>(sum, shared);", "row_sum<Lanes>(sum, shared);"),
    ("cross_entropy_backward.cuh", "if (!real) return;", "", "loss"),
    ("cross_entropy_backward.cuh", "(bad ? NAN : g * grad)", "g * grad"),
    ("cross_entropy_backward.cuh", "g /= *p.normalizer;", ";"),
    (
        "cross_entropy_backward.cuh",
        "total += by_index ? class_weight(p, c) : soft_target(c);",
        "total += soft_target(c);",
    ),
    ("shapes.h", "classes <= 4096 ? 32 : kLossThreads", "kLossThreads", "loss"),
    ("cross_entropy.cuh", "const int classes = real ? s.classes : 0;", "const int classes = s.classes;"),
    ("cross_entropy.cuh", "if (t != s.ignore_index) {", "if (true) {"),
    ("cross_entropy.cuh", "if (t < 0 || t >= s.classes) {", "if (false) {"),
    ("cross_entropy_backward.cuh", "x[j] = ignored ? 0.0f", "x[j] = false ? 0.0f"),
]

# fault -> why no test can see it
EQUIVALENT = {
    "cross_entropy.cuh: s.stride_d % kVec16<T> == 0 && address_bits % 16 == 0; -> s.stride_d % kVec16<T> == 0;": (
        "x86 reads and writes anywhere; alignment is what sanitize.py asan checks"
    ),
    **{
        f"../norm.cu: {name}_vec(p, c.channels) ? kVec16<T> : 1 -> kVec16<T>": (
            "another mapping of threads to channels, the same numbers: the launch asks again"
        )
        for name in ("act_backward", "batch_norm", "batch_norm_backward")
    },
    "conv_launch.cuh: return tile < 2 ? 0 : -> return tile < 2 ? 1 :": "another tile gives the same numbers",
    "shapes.h: classes <= 4096 ? 32 : kLossThreads -> kLossThreads": "another mapping gives the same numbers",
    "conv_gemm.cuh: classes = min_int(g.stride_h, g.h) * -> classes = g.stride_h *": (
        "saves work only: a class beyond the map has no rows"
    ),
    "column_tile.cuh: int64_t most = ceil_div64(rows, min_rows); -> int64_t most = chunks;": (
        "saves work only: more and shorter chunks, merged all the same"
    ),
    "batch_norm.cuh: if (!t.active) return; if (Split) -> if (Split)": (
        "two rows reach as far as any column's thread: the value read is not used"
    ),
    "batch_norm_backward.cuh: (p.training && p.dx) -> p.dx": "saves work only: the sums are not used in evaluation",
    "cross_entropy.cuh: if (thread != 0) return; -> nothing": "every thread writes the same values",
    "cross_entropy.cuh: s.classes % kVec16<T> == 0 && s.stride_n -> s.stride_n": (
        "the stride of rows that lie in one piece is the number of classes"
    ),
    "act_backward.cuh: if (c < channels) -> if (true)": "reads sums of other chunks, which are then not stored",
    "cross_entropy.cuh: const int classes = real ? s.classes : 0; -> const int classes = s.classes;": (
        "saves work only: idle lanes read row 0 and store nothing"
    ),
    "conv_gemm.cuh: if (m0 >= m_total) return; -> nothing": "saves work only: every row of such a tile is masked",
    "conv_gemm.cuh: const int kt1 = min_int(kt0 + per_split, k_tiles); "
    "-> const int kt1 = kt0 + per_split;": "saves work only: k beyond the total is masked to zero",
    "conv_gemm.cuh: if (next < kt1) commit(next); -> commit(next);": "saves work only: that stage is not read again",
}


def family_of(file: str) -> str:
    return FAMILY_OF.get(Path(file).stem, "conv")


def fork_tests(family: str, env: dict[str, str], output: IO[str]) -> tuple[int, str]:
    """Runs the family's tests in a fork, so that torch is imported once; returns exit status and output."""
    child = os.fork()
    if child == 0:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        os.environ.update(env)
        signal.alarm(TIMEOUT)  # a fault may hang the kernel: the signal's death is red too
        for name in ("simt_lib", "simt_conv"):  # they read the environment when imported
            sys.modules.pop(name, None)
        code = 3
        try:
            options = ["-x", "-q", "-p", "no:cacheprovider", "--noconftest", "--no-header", "--tb=line"]
            code = int(pytest.main([*options, str(simt_lib.HERE / f"test_simt_{family}.py")]))
        finally:
            sys.stdout.flush()
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    output.seek(0)
    return status, output.read()


def run_tests(family: str, env: dict[str, str]) -> bool:
    """Whether the family's tests pass under env."""
    with tempfile.TemporaryFile("w+") as output:
        status, text = fork_tests(family, env, output)
    if "does not compile" in text or status in (2, 3, 4, 5):  # no verdict: pytest itself, or the edit, went wrong
        raise SystemExit(f"cannot judge a fault ({env}):\n{text[-3000:]}")
    return status == 0  # 1: failed tests; negative: a crash, which is red as well


def sites() -> list[tuple[str, int, str]]:
    found = []
    for path in sorted(simt_lib.KERNELS.glob("*.cuh")):
        if path.name in ("ptx.cuh", "launch.cuh"):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code = line.split("//")[0]
            if SITE.search(code):
                found.append((path.name, number, SITE.search(code)[0]))
    return found


class Fault(NamedTuple):
    """One fault: its description, the tests that look for it, and the edit (old, new), or none for a site skipped."""

    name: str
    family: str
    file: str
    skip: str = ""
    old: str = ""
    new: str = ""
    full: bool = False

    def survives(self) -> bool:
        if self.skip:
            return run_tests(self.family, {"FASTCONV_SIMT_SKIP": self.skip})
        with tempfile.TemporaryDirectory(prefix="fastconv-mutant-") as folder:
            # with the launch files beside the kernels: they include them by relative paths
            shutil.copytree(simt_lib.LAUNCH, Path(folder) / "cuda")
            kernels = Path(folder) / "cuda" / "kernels"
            (kernels / self.file).write_text(self.edited((kernels / self.file).read_text()))
            env = {"FASTCONV_SIMT_KERNELS": str(kernels)} | ({} if self.full else {"FASTCONV_SIMT_QUICK": "1"})
            return run_tests(self.family, env)

    def edited(self, text: str) -> str:
        pattern = r"\s*".join(re.escape(word) for word in self.old.split())  # however clang-format breaks the line
        text, count = re.subn(pattern, lambda _: self.new, text, count=1)
        if not count:
            raise SystemExit(f"mutate.py is out of date: {self.file} no longer holds {self.old!r}")
        return text


def faults() -> list[Fault]:
    """All of them; raises SystemExit where an edit no longer fits its file."""
    found = []
    for file, line, what in sites():
        place = f"{file}:{line}"
        found.append(Fault(f"{place} without {what}", family_of(file), file, skip=place))
    for file, old, new, *how in EDITS:
        name = f"{file}: {' '.join(old.split())} -> {' '.join(new.split()) or 'nothing'}"
        full = how == ["full"]
        found.append(Fault(name, family_of(file) if full or not how else how[0], file, "", old, new, full))
        found[-1].edited((simt_lib.KERNELS / file).read_text())
    return found


class Verdicts:
    """What was judged so far with these very kernels and this emulator: one line of JSON each, appended by any process.

    The tests are left out of the key, so that a new one does not undo what the others have caught: --again judges those
    that survived. Where tests were taken away or loosened, the file has to go.
    """

    def __init__(self) -> None:
        digest = hashlib.sha256()
        files = [p for p in simt_lib.LAUNCH.rglob("*") if p.suffix in (".cuh", ".h", ".cu")]
        files += [p for p in simt_lib.HERE.glob("*.*") if p.suffix in (".h", ".cuh") or p.name.startswith("driver_")]
        # conv2d_config.h picks tiles: no test of a kernel asks it.
        for path in sorted(p for p in files if p.name != "conv2d_config.h"):
            digest.update(path.read_bytes())
        self.path = simt_lib.BUILD / f"mutation-{digest.hexdigest()[:16]}.jsonl"

    def read(self) -> dict[str, bool]:
        """name -> whether it survived (a baseline: whether the tests passed)."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return dict(json.loads(line) for line in lines)

    def add(self, name: str, survived: bool) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            file.write(json.dumps([name, survived]) + "\n")


def check_baseline(families: set[str], verdicts: Verdicts, until: float) -> bool:
    """Whether the unbroken kernels have passed; False where the time is over. SystemExit where they fail."""
    for family in sorted(families):
        for env in ({}, {"FASTCONV_SIMT_QUICK": "1"}):
            name = f"unbroken {family}{' quick' if env else ''}"
            if name in verdicts.read():
                continue
            if time.monotonic() > until:
                return False
            if not run_tests(family, env):
                raise SystemExit(f"the {family} tests fail before any fault is made ({env})")
            verdicts.add(name, True)
    return True


HISTORY = """\
Three barriers and waits that survived the first run proved to be needless, and so did one bound that no tile could reach:
they are gone from the kernels. Gaps that became tests: NaN behind a partial k-tile, reads past the end of an operand (guard
pages), stride and dilation with a common factor, a window that leaves the padded image, channels that fit 16 bytes on one
side only, odd sides under a strided data gradient, a workspace that is not needed, unaligned depthwise operands, rounding
between layers in the depthwise prologue, means and logits far from zero, rows of infinite logits, parameters and running
statistics of different dtypes, the folded batch norm.
"""


def page(all_faults: list[Fault], judged: dict[str, bool]) -> str:
    """mutation.md."""
    rows = []
    for title, kind in (
        ("barrier, warp barrier, cp.async wait or commit left out", [f for f in all_faults if f.skip]),
        ("edits of the kernels", [f for f in all_faults if not f.skip and not f.file.startswith("../")]),
        ("edits of the launches (csrc/cuda/*.cu, *.cuh)", [f for f in all_faults if f.file.startswith("../")]),
    ):
        done = [f for f in kind if f.name in judged]
        survived = [f for f in done if judged[f.name]]
        invisible = [f for f in survived if f.name in EQUIVALENT]
        counts = len(done) - len(survived), len(invisible), len(survived) - len(invisible), len(kind) - len(done)
        rows.append(f"| {title} | {len(kind)} | {' | '.join(map(str, counts))} |")
    head = ["| faults | listed | caught | invisible by nature | survived | not judged |"]
    head += ["| --- " * 6 + "|"]
    seen = [f"- `{name}`: {why}" for name, why in EQUIVALENT.items() if judged.get(name)]
    return "\n".join(
        [
            "# Mutation score",
            "",
            "Written by `python tests/simt/mutate.py --write`: faults made in the kernels and their launches on purpose, and",
            "whether the emulator's tests turned red.",
            "",
            *head,
            *rows,
            "",
            "Invisible by nature:",
            "",
            *seen,
            "",
            HISTORY,
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="*", default=[""], help="run only the faults whose description holds one of these"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no fault after so many minutes")
    parser.add_argument("--part", default="1/1", help="I/N: every N-th fault, from the I-th")
    parser.add_argument("--again", action="store_true", help="judge the survivors again")
    parser.add_argument("--write", action="store_true", help="write mutation.md from what is judged so far")
    args = parser.parse_args()
    until = time.monotonic() + args.minutes * 60
    everything, verdicts = faults(), Verdicts()
    first, step = map(int, args.part.split("/"))
    work = [f for f in everything if any(o in f.name for o in args.only)][first - 1 :: step]
    if check_baseline({f.family for f in work}, verdicts, until):
        for fault in work:
            known = verdicts.read().get(fault.name)
            if known is not None and not (known and args.again and fault.name not in EQUIVALENT):
                continue
            if time.monotonic() > until:
                break
            verdicts.add(fault.name, fault.survives())
            print(("SURVIVED " if verdicts.read()[fault.name] else "caught   ") + fault.name, flush=True)
    judged = verdicts.read()
    done = [f for f in work if f.name in judged]
    survivors = [f.name for f in done if judged[f.name] and f.name not in EQUIVALENT]
    caught = sum(not judged[f.name] for f in done)
    print(
        f"{caught} of {len(done)} faults caught, {len(done) - caught - len(survivors)} known to be invisible, "
        f"{len(survivors)} survived, {len(work) - len(done)} left"
    )
    for name in survivors:
        print("SURVIVED " + name)
    if args.write:
        (simt_lib.HERE / "mutation.md").write_text(page(everything, judged))
    sys.exit(1 if survivors else 3 * (len(done) < len(work)))


if __name__ == "__main__":
    main()
