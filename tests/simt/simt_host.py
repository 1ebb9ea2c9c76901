"""Builds the host side of the CUDA operators (csrc/cuda/*.cpp) over the emulator and registers them for CPU tensors as
torch.ops.fastconv_simt.*: the backend "simt" of the suite."""

from __future__ import annotations

import hashlib
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import simt_lib
import torch
from torch.utils import cpp_extension

FAMILIES = ["conv", "norm", "pool", "loss", "update"]
# Host code that both devices share; csrc/cpu has the CPU's own.
SOURCES = [simt_lib.HERE / "host.cpp", *sorted((simt_lib.ROOT / "csrc" / "host").glob("*.cpp"))]
SOURCES += sorted(simt_lib.LAUNCH.glob("*.cpp"))


def _compile(source: Path, digest_of_headers: bytes) -> Path:
    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    command = ["g++", "-std=c++17", "-O1", "-fPIC", "-DFASTCONV_SIMT", "-Wall", "-Wno-unknown-pragmas", *includes]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
    digest = hashlib.sha256("\0".join(command).encode() + digest_of_headers + source.read_bytes()).hexdigest()[:16]
    target = simt_lib.BUILD / "host" / f"{source.parent.name}-{source.stem}-{digest}.o"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}.part")
        done = subprocess.run([*command, "-c", str(source), "-o", str(part)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile for the emulator:\n{done.stderr[:4000]}")
        part.rename(target)
    return target


def build() -> Path:
    """The library's path, built if it is not there. Raises RuntimeError with the compiler's words."""
    csrc = simt_lib.ROOT / "csrc"
    headers = [
        *csrc.glob("*.h"),
        *(csrc / "host").glob("*.h"),
        *(csrc / "cuda").glob("*.h"),
        *simt_lib.KERNELS.glob("*.h"),
    ]
    digest = hashlib.sha256(torch.__version__.encode())
    for header in sorted(headers):
        digest.update(header.read_bytes())
    jobs = [lambda f=family: simt_lib.build(f) for family in FAMILIES]
    jobs += [lambda s=source: _compile(s, digest.digest()) for source in SOURCES]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        parts = list(pool.map(lambda job: job(), jobs))
    name = hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]
    library = simt_lib.BUILD / f"fastconv_simt-{name}.so"
    if not library.exists():
        part = library.with_suffix(f".{os.getpid()}.part")
        torch_lib = Path(torch.__file__).parent / "lib"
        command = ["g++", "-shared", "-o", str(part), *map(str, reversed(parts)), f"-L{torch_lib}"]
        command += ["-ltorch", "-ltorch_cpu", "-lc10"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the emulator's operators do not link:\n{done.stderr[:4000]}")
        part.rename(library)
    return library


def load() -> None:
    """Registers torch.ops.fastconv_simt.* in this process; once."""
    if not hasattr(torch.ops.fastconv_simt, "conv2d_bias_act"):
        torch.ops.load_library(str(build()))
