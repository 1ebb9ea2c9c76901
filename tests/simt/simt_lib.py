"""Builds the CUDA kernels for the CPU emulator and calls them through ctypes.

One shared library per driver_<family>.cpp, kept under build/simt/ by a hash of everything that it is made of.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import shutil
import subprocess
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LAUNCH = ROOT / "csrc" / "cuda"
KERNELS = LAUNCH / "kernels"
BUILD = ROOT / "build" / "simt"

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ACTIVATIONS = ["identity", "relu", "relu6", "leaky_relu", "sigmoid", "tanh", "silu", "gelu", "hardswish"]
SAVES_OUTPUT = {"identity", "relu", "relu6", "leaky_relu", "sigmoid", "tanh"}
COUNTERS = ["ldmatrix", "ldmatrix_conflicts", "mma", "cp_async16", "cp_async_small", "barriers", "blocks"]

SANITIZE = {
    "": ["-O1"],
    "asan": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"],
    "tsan": ["-O1", "-g", "-fsanitize=thread"],
}


def cuda_include() -> Path | None:
    """The folder with cuda_fp16.h, or None. The emulator needs the headers, never the CUDA runtime."""
    roots = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda", *sorted(map(str, Path("/usr/local").glob("cuda-*")))]
    if nvcc := shutil.which("nvcc"):
        roots.append(str(Path(nvcc).resolve().parents[1]))
    for root in roots:
        include = Path(root) / "include"
        if root and (include / "cuda_fp16.h").exists():
            return include
    return None


def missing() -> str | None:
    """Why the emulator cannot run here, or None."""
    if not shutil.which("g++"):
        return "no g++"
    if os.uname().machine != "x86_64":
        return "the emulator's context switch is written for x86-64"
    if cuda_include() is None:
        return "no CUDA headers (cuda_fp16.h); set CUDA_HOME"
    return None


def cpu_flags() -> list[str]:
    flags = Path("/proc/cpuinfo").read_text().split()
    return [f"-m{f}" for f in ("avx2", "fma", "f16c") if f in flags]


def build(
    family: str, sanitize: str = "", kernels: Path = KERNELS, extra: tuple[str, ...] = (), out: Path | None = None
) -> Path:
    """Compile driver_<family>.cpp; returns the library's path. Raises RuntimeError with the compiler's words."""
    sources = [
        HERE / f"driver_{family}.cpp",
        *sorted(HERE.glob("*.h")),
        *sorted(HERE.glob("*.cuh")),
        *sorted(kernels.glob("*.cuh")),
        *sorted(kernels.glob("*.h")),
        *sorted(kernels.parent.glob("*.cu")),
        *sorted(kernels.parent.glob("*.cuh")),
        *sorted(kernels.parent.glob("*.h")),
    ]
    command = ["g++", "-std=c++17", *SANITIZE[sanitize], *cpu_flags(), "-fPIC", "-shared", "-DFASTCONV_SIMT", *extra]
    command += [
        "-Wall",
        "-Wno-unknown-pragmas",
        f"-I{kernels}",
        f"-I{kernels.parent}",
        f"-I{HERE}",
        f"-isystem{cuda_include()}",
    ]
    digest = hashlib.sha256("\0".join(command).encode())
    for source in sources:
        digest.update(source.read_bytes())
    library = (out or BUILD) / f"{family}{'-' + sanitize if sanitize else ''}-{digest.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        part = library.with_suffix(f".{os.getpid()}.part")
        done = subprocess.run([*command, str(sources[0]), "-o", str(part)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{sources[0].name} does not compile:\n{done.stderr[:4000]}")
        part.rename(library)  # atomic: two test processes may build at once
    return library


class Library:
    """One driver library: call(name, *args) raises RuntimeError with the emulator's message."""

    def __init__(self, path: Path):
        self.lib = ctypes.CDLL(str(path))
        self.lib.simt_error.restype = ctypes.c_char_p
        self.counters: dict[str, int] = {}

    def launches(self) -> dict[str, int]:
        """Kernel -> how often it was started since the last time."""
        self.lib.simt_launches.restype = ctypes.c_char_p
        lines = [line.split() for line in self.lib.simt_launches().decode().splitlines()]
        return {symbol: int(count) for count, symbol in lines}

    def call(self, name: str, *args, seed: int = 0) -> int:
        self.lib.simt_seed(ctypes.c_uint64(seed))
        status = getattr(self.lib, name)(*args)
        values = (ctypes.c_int64 * len(COUNTERS))()
        self.lib.simt_counters(values)
        self.counters = dict(zip(COUNTERS, values, strict=True))
        if status:
            raise RuntimeError(self.lib.simt_error().decode())
        return status


# The mutation script rebuilds often: QUICK means unoptimised, and bf16 alone for the convolutions.
QUICK = os.environ.get("FASTCONV_SIMT_QUICK") == "1"


def conv_dtypes(*wanted: torch.dtype) -> list[torch.dtype]:
    """Those of the wanted dtypes that the convolution library of this run was built for."""
    return [d for d in wanted if d == torch.bfloat16 or not QUICK]


_guards: list[mmap.mmap] = []
_loaded: dict[str, Library] = {}


def library(family: str) -> Library:
    """The library of a family, built at first use. FASTCONV_SIMT_SANITIZE=asan|tsan picks an instrumented build, and
    FASTCONV_SIMT_KERNELS another copy of the kernels (the mutation script's)."""
    if family not in _loaded:
        kernels = Path(os.environ.get("FASTCONV_SIMT_KERNELS", KERNELS))
        out = None if kernels == KERNELS else kernels
        extra = ("-O0", "-DFASTCONV_SIMT_DTYPES=4") if QUICK else ()
        _loaded[family] = Library(build(family, os.environ.get("FASTCONV_SIMT_SANITIZE", ""), kernels, extra, out))
    return _loaded[family]


def pointer(t: torch.Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def nhwc(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def dense_nhwc(shape: tuple[int, ...], dtype: torch.dtype, fill: float = float("nan"), offset: int = 0) -> torch.Tensor:
    """An NCHW-indexed tensor whose memory is exactly n*h*w*c elements in NHWC order (also where c or h*w is 1),
    starting `offset` elements into its storage: offset 1 makes it unaligned."""
    n, c, h, w = shape
    flat = torch.full((n * h * w * c + offset,), fill, dtype=dtype)[offset:]
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)


def to_nhwc(t: torch.Tensor, offset: int = 0) -> torch.Tensor:
    out = dense_nhwc(tuple(t.shape), t.dtype, 0.0, offset)
    out.copy_(t)
    return out


def guarded(t: torch.Tensor) -> torch.Tensor:
    """A flat copy of t's memory whose last byte is the last before an unmapped page: one element further crashes."""
    flat = t.detach().clone(memory_format=torch.preserve_format).as_strided((t.numel(),), (1,))
    page, size = mmap.PAGESIZE, t.numel() * t.element_size()
    pages = -(-size // page)
    area = mmap.mmap(-1, (pages + 1) * page)
    _guards.append(area)  # mapped for the life of the process, as the guard page must be
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address + pages * page), ctypes.c_size_t(page), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    out = torch.frombuffer(area, dtype=t.dtype, count=t.numel(), offset=pages * page - size)
    return out.copy_(flat)


def integers(shape, dtype, generator, low: int = -2, high: int = 2) -> torch.Tensor:
    """Small integers: their products and sums are exact in every dtype used, so results must be equal, not close."""
    return torch.randint(low, high + 1, shape, generator=generator).to(dtype)


def tolerance(dtype: torch.dtype) -> float:
    """Half a unit in the last place of the dtype, relative, with room for fp32 arithmetic."""
    return {torch.float32: 2e-6, torch.float16: 2**-11 * 1.1, torch.bfloat16: 2**-8 * 1.1}[dtype]


def assert_close(got: torch.Tensor, want: torch.Tensor, rel: float, absolute: float = 1e-5) -> None:
    got, want = got.double(), want.double()
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    nan = torch.isnan(want)
    assert torch.equal(torch.isnan(got), nan), "NaN in different places"
    excess = ((got - want).abs() - rel * want.abs() - absolute)[~nan]
    if excess.numel():
        assert excess.max() <= 0, (
            f"off by {(got - want)[~nan].abs().max():.3e}, {(excess > 0).sum()} of {excess.numel()} values"
        )
