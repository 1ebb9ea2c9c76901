"""Compiles the Triton kernels ahead of time, without a GPU, and writes tests/triton_resources.md.

    python tests/triton_resources.py [--arch 80 90 100 120] [--check]

The launchers run on meta tensors with their launch function replaced by a recorder, so that what is compiled is what
they would start: the same argument types, specialisations (== 1, divisible by 16) and constants. Every recorded variant
is compiled for every architecture; registers, shared memory and local memory (spills) come from the cubin, the
instructions from the PTX. Resource figures are ptxas', not measured on a device.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

ARCHS = (80, 90, 100, 120)
_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
_TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.int64: "*i64", torch.uint8: "*u8", torch.int32: "*i32",
}  # fmt: skip
_MODULES = (
    "act_bias_backward", "batch_norm_stats", "batch_norm_act", "batch_norm_act_backward", "bn_fold", "cross_entropy",
    "max_pool2d", "avg_pool2d", "conv2d", "depthwise",
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One kernel with the types and constants of one launch."""

    label: str = field(compare=False)
    kernel: object = field(repr=False)
    signature: tuple
    constants: tuple
    divisible: tuple
    warps: int
    stages: int

    def compile(self, arch: int):
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        source = ASTSource(
            self.kernel,
            dict(self.signature),
            {(i,): value for i, value in self.constants},
            {(i,): [["tt.divisibility", 16]] for i in self.divisible},
        )
        options = {"num_warps": self.warps, "num_stages": self.stages}
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def variant(label: str, kernel, args: tuple, meta: dict) -> Variant:
    """The specialisation that Triton would compile for this launch."""
    meta = dict(meta)
    warps, stages = meta.pop("num_warps", 4), meta.pop("num_stages", 3)
    names = kernel.arg_names
    values = dict(zip(names, args, strict=False)) | meta
    signature, constants, divisible = [], [], []
    for i, name in enumerate(names):
        value = values[name]
        if kernel.params[i].is_constexpr or value is None or (type(value) is int and value == 1):
            signature.append((name, "constexpr"))
            constants.append((i, value))
        elif isinstance(value, torch.Tensor):
            signature.append((name, _TYPES[value.dtype]))
            divisible.append(i)
        elif hasattr(value, "block_shape"):
            element = _TYPES[value.base.dtype].removeprefix("*")
            signature.append((name, f"tensordesc<{element}{list(value.block_shape)}>"))
        elif isinstance(value, float):
            signature.append((name, "fp32"))
        else:
            signature.append((name, "i32" if abs(value) < 2**31 else "i64"))
            if value % 16 == 0:
                divisible.append(i)
    return Variant(label, kernel, tuple(signature), tuple(constants), tuple(divisible), warps, stages)


@contextmanager
def recording():
    """Yields (set_label, variants): inside, every launch is noted with its architectures and none is made."""
    found: dict[Variant, set[int]] = {}
    current: tuple[str, tuple[int, ...]] = ("", ARCHS)

    def set_label(text: str, archs: tuple[int, ...] = ARCHS) -> None:
        nonlocal current
        current = text, archs

    def note(kernel, grid, *args, **meta):
        assert all(extent > 0 for extent in grid)
        found.setdefault(variant(current[0], kernel, args, meta), set()).update(current[1])

    modules = [importlib.import_module(f"fastconv.triton.{name}") for name in _MODULES]
    before = [module.launch for module in modules]
    for module in modules:
        module.launch = note
    try:
        yield set_label, found
    finally:
        for module, launch in zip(modules, before, strict=True):
            module.launch = launch


@dataclass(frozen=True)
class Resources:
    registers: int
    local: int  # bytes per thread: spills and stack
    shared: int
    tensor_core: str
    asynchronous: str


def resources(compiled) -> Resources:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = compiled.asm["ptx"]
    tensor_core = next((word for word in ("tcgen05.mma", "wgmma", "mma.sync") if word in ptx), "-")
    asynchronous = next((word for word in ("cp.async.bulk.tensor", "cp.async") if word in ptx), "-")
    return Resources(
        numbers["REG"], max(numbers["STACK"], numbers["LOCAL"]), compiled.metadata.shared, tensor_core, asynchronous
    )


def meta_image(n, c, h, w, dtype) -> torch.Tensor:
    return torch.empty(n, c, h, w, dtype=dtype, device="meta", memory_format=torch.channels_last)


def record_convolutions(label: Callable, dtype: torch.dtype, tiles: str = "chosen") -> None:
    """ResNet50's kinds of convolution at batch 128, 32 pixels, and one whose channels are multiples of 8 but not of 16;
    ``tiles``: the chosen one, or all candidates."""
    from fastconv.triton import conv2d
    from fastconv.triton.conv_config import candidates

    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float32:
        name += " " + conv2d.precision(dtype)
    for kind, c, size, k, taps, stride in (
        ("1x1", 256, 8, 64, 1, 1), ("3x3", 64, 8, 64, 3, 1), ("3x3 on 2x2", 256, 2, 256, 3, 1),
        ("3x3 stride 2", 128, 8, 128, 3, 2), ("stem 7x7", 3, 32, 64, 7, 2), ("1x1 of eights", 24, 32, 136, 1, 1),
    ):  # fmt: skip
        x, w = meta_image(128, c, size, size, dtype), meta_image(k, c, taps, taps, dtype)
        pad = (taps // 2, taps // 2)
        a = conv2d.problem_of(x.shape, w.shape, (stride, stride), pad, (1, 1), 1, x.dtype)
        y = meta_image(a.n, a.k, a.p, a.q, dtype)
        bias = torch.empty(k, dtype=dtype, device="meta")
        for op, run in (
            ("fprop", lambda t, x=x, w=w, y=y, a=a, b=bias: conv2d.fprop(x, w, y, a, t, shift=b, activation="relu")),
            ("dgrad", lambda t, x=x, w=w, y=y, a=a: conv2d.dgrad(y, w, x, a, t)),
            ("wgrad", lambda t, x=x, w=w, y=y, a=a: conv2d.wgrad(y, x, w, a, t)),
        ):
            if c == 3 and op == "dgrad":
                continue
            wanted: dict = {}
            for arch in ARCHS:
                found = candidates(op, a, shared=_SHARED[arch])
                for t in found if tiles == "all" else found[:1]:
                    wanted.setdefault(t, []).append(arch)
            for t, archs in wanted.items():
                split = f"/{t.splits}" if t.splits > 1 else ""
                where = (" positions" if t.positions else "") + (" tma" if t.descriptors else "")
                label(f"{op} {kind} {name} {t.rows}x{t.columns}x{t.chunk}{split} s{t.stages}{where}", tuple(archs))
                run(t)
        if kind == "3x3":
            t = candidates("fprop", a, shared=min(_SHARED.values()))[0]
            vector = torch.empty(c, device="meta")
            label(f"fprop {kind} {name}, prologue + statistics")
            parts = conv2d.partials(conv2d.row_tiles(a, t, a.p * a.q), k, x.device)
            conv2d.fprop(x, w, y, a, t, prologue=(vector, vector, "relu"), statistics=parts)
            label(f"fprop {kind} {name}, scale + shift + residual + silu + preact")
            conv2d.fprop(
                x, w, y, a, t, scale=vector, shift=vector, residual=y, preact=torch.empty_like(y), activation="silu"
            )


def record_the_rest(label: Callable, dtype: torch.dtype) -> None:
    from fastconv.triton import impl

    name = str(dtype).removeprefix("torch.")
    vector = torch.empty(256, device="meta")
    counter = torch.empty((), dtype=torch.int64, device="meta")
    for rows, size in (("many rows", 16), ("few rows", 2)):
        x = meta_image(128, 256, size, size, dtype)
        label(f"batch norm {name}, {rows}, residual, relu")
        impl("batch_norm_act")(x, x, vector, vector, vector, vector, counter, True, 0.1, 1e-5, "relu")
        impl("batch_norm_act_backward")(x, x, x, None, vector, vector, vector, vector, True, "relu", [True] * 4)
        label(f"batch norm {name}, {rows}, silu")
        impl("batch_norm_act")(x, None, vector, vector, vector, vector, counter, True, 0.1, 1e-5, "silu")
        impl("batch_norm_act_backward")(
            x, x, None, None, vector, vector, vector, vector, True, "silu", [True, False, True, True]
        )
    label(f"batch norm {name}, evaluation")
    impl("batch_norm_act")(x, None, vector, vector, vector, vector, None, False, 0.1, 1e-5, "relu")
    mask = [True, True, False, False]
    impl("batch_norm_act_backward")(x, x, x, None, vector, None, vector, vector, False, "relu", mask)
    x = meta_image(128, 256, 16, 16, dtype)
    w = meta_image(64, 256, 1, 1, dtype)
    label(f"folded batch norm {name}")
    v64 = torch.empty(64, device="meta")
    impl("conv2d_bn_act")(
        x, w, None, None, v64, v64, v64, v64, None, (1, 1), (0, 0), (1, 1), 1, False, 0.1, 1e-5, "relu", False
    )
    for act in ("relu", "gelu", "tanh", "hardswish"):
        label(f"activation + bias backward {name}, {act}")
        impl("act_bias_backward")(x, x, act, [True, True])
    label(f"max pool 3x3 stride 2 {name}")
    window = ((3, 3), (2, 2), (1, 1))
    y, offsets = impl("max_pool2d")(x, *window, (1, 1), False, True)
    impl("max_pool2d_backward")(y, offsets, (16, 16), *window, (1, 1), True)
    label(f"average pool 3x3 stride 2 {name}")
    y = impl("avg_pool2d")(x, *window, False, True, None)
    impl("avg_pool2d_backward")(y, (16, 16), *window, False, True, None, True)
    label(f"adaptive average pool {name}")
    y = impl("adaptive_avg_pool2d")(x, (1, 1))
    impl("adaptive_avg_pool2d_backward")(y, (16, 16), True)
    target = torch.empty(512, dtype=torch.int64, device="meta")
    for classes in (10, 1000, 50257):
        logits = torch.empty(512, classes, dtype=dtype, device="meta")
        w = torch.empty(classes, dtype=dtype, device="meta")
        for kind, t, smooth in (("indices", target, 0.0), ("smoothed", target, 0.1), ("probabilities", logits, 0.0)):
            label(f"cross-entropy {classes} {kind} {name}")
            loss, lse, norm = impl("cross_entropy")(logits, t, w if smooth else None, 1, -100, smooth)
            impl("cross_entropy_backward")(
                loss, logits, t, w if smooth else None, lse, norm, 1, -100, smooth, [True, t is logits]
            )
    label(f"depthwise 3x3 {name}")
    x, w = meta_image(32, 128, 16, 16, dtype), meta_image(128, 1, 3, 3, dtype)
    how = ((1, 1), (1, 1), (1, 1), 128)
    y, _ = impl("conv2d_bias_act")(x, w, None, None, *how, "relu", False)
    impl("conv2d_backward")(y, x, w, *how, [True, True])


def record_everything() -> dict[Variant, set[int]]:
    """What runs by default, on every architecture in bf16; float16, float32 and all other candidates on sm_90."""
    with recording() as (label, found):
        record_convolutions(label, torch.bfloat16)
        record_the_rest(label, torch.bfloat16)
    with recording() as (label, more):
        for allowed in ("tf32", "ieee"):
            torch.backends.cudnn.conv.fp32_precision = allowed
            record_convolutions(label, torch.float32)
        record_convolutions(label, torch.float16)
        record_the_rest(label, torch.float32)
        record_convolutions(label, torch.bfloat16, "all")
    for v, archs in more.items():
        found.setdefault(v, archs & {90})
    return {v: archs for v, archs in found.items() if archs}


def table(variants: dict[Variant, set[int]], archs: tuple[int, ...]) -> tuple[str, list[str]]:
    """(the page, the variants that spill or need more shared memory than the architecture has)"""
    columns = " | ".join(f"sm_{a}: registers / shared KiB / local B / instructions" for a in archs)
    lines, bad = [f"| kernel | launch | {columns} |", "|" + " --- |" * (2 + len(archs))], []
    for v, wanted in variants.items():
        cells = []
        for arch in archs:
            if arch not in wanted:
                cells.append("-")
                continue
            r = resources(v.compile(arch))
            words = " ".join(w for w in (r.tensor_core, r.asynchronous) if w != "-")
            cells.append(f"{r.registers} / {r.shared / 1024:.0f} / {r.local} / {words or 'none'}")
            if r.local:
                bad.append(f"sm_{arch}: {v.kernel.__name__}, {v.label}: {r.local} bytes of local memory per thread")
            if r.shared > _SHARED[arch]:
                bad.append(f"sm_{arch}: {v.kernel.__name__}, {v.label}: {r.shared} bytes of shared memory")
        lines.append(f"| {v.kernel.__name__} | {v.label} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n", bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHS))
    parser.add_argument("--check", action="store_true", help="do not write the page, only fail on spills")
    options = parser.parse_args()
    import triton

    variants = record_everything()
    page, bad = table(variants, tuple(options.arch))
    summary = f"{len(variants)} variants, compiled by Triton {triton.__version__} for " + ", ".join(
        f"sm_{a}" for a in options.arch
    )
    text = (
        "# Registers, shared memory and spills of the Triton kernels\n\n"
        f"Written by tests/triton_resources.py without a GPU: {summary}. Registers and local memory (spills, stack) "
        "per thread as ptxas allots them. A dash: not a candidate of that architecture, or not compiled for it (bf16 "
        "defaults are compiled for all; float16, float32 and the remaining candidates of a tuner for sm_90).\n\n"
        + ("Spills and overflows:\n\n" + "\n".join(f"- {line}" for line in bad) if bad else "No spills.")
        + "\n\n" + page
    )  # fmt: skip
    if not options.check:
        Path(__file__).with_suffix(".md").write_text(text)
    print(f"{summary}; {len(bad)} spill or overflow")
    raise SystemExit(bool(bad) if options.check else 0)


if __name__ == "__main__":
    main()
