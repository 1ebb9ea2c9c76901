"""Builds ``fastconv._C``: the CPU kernels always, the CUDA kernels when a CUDA compiler is there.

Environment:

FASTCONV_CUDA=0|1      leave the CUDA kernels out, or insist on them (an error where they cannot be built)
CUDA_HOME              the CUDA toolkit; found through nvcc or in /usr/local when unset
TORCH_CUDA_ARCH_LIST   architectures to compile for; default: the GPU that is there, else 8.0 9.0a 10.0 12.0
MAX_JOBS               parallel compiler processes of ninja
CXX                    the C++ compiler

Without a C++ compiler, or without torch at build time, the pure-Python part is installed and says so when asked
(``python -m fastconv info``).
"""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "8.0;9.0a;10.0;12.0"


def say(text: str) -> None:
    print(f"fastconv: {text}", file=sys.stderr, flush=True)


def _is_toolkit(path: Path) -> bool:
    return (path / "bin" / "nvcc").is_file() and (path / "include" / "cuda_runtime.h").is_file()


def find_cuda_home() -> Path | None:
    """The toolkit's folder, or None.

    The nvcc in PATH may be a wrapper or a link that lies outside the toolkit, so its own folder proves nothing:
    ``nvcc --dryrun`` prints the folder that the real compiler works from.
    """
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            path = Path(os.environ[name])
            if _is_toolkit(path):
                return path
            say(f"{name}={path} holds no bin/nvcc with include/cuda_runtime.h; looking elsewhere")
    nvcc = shutil.which("nvcc")
    if nvcc:
        dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
        for line in (dry.stdout + dry.stderr).splitlines():
            if line.startswith("#$ TOP="):
                path = Path(line[len("#$ TOP=") :].strip()).resolve()
                if _is_toolkit(path):
                    return path
        beside = Path(nvcc).resolve().parent.parent
        if _is_toolkit(beside):
            return beside
    for place in ["/usr/local/cuda", *sorted(glob.glob("/usr/local/cuda-*"), reverse=True), "/opt/cuda"]:
        if _is_toolkit(Path(place)):
            return Path(place).resolve()
    return None


def cxx_compiler() -> str | None:
    named = os.environ.get("CXX")
    for name in [named] if named else ["c++", "g++", "clang++"]:
        if shutil.which(name.split()[0]):
            return name
    return None


def cuda_release(home: Path) -> str:
    text = subprocess.run([str(home / "bin" / "nvcc"), "--version"], capture_output=True, text=True).stdout
    after = text.partition("release ")[2]
    return after.partition(",")[0].strip()


def decide_cuda(torch) -> tuple[Path | None, str]:
    """(toolkit, reason): the toolkit to build with, or None and the reason in words."""
    wish = os.environ.get("FASTCONV_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"fastconv: FASTCONV_CUDA expected 0 or 1, got {wish!r}")
    if wish == "0":
        return None, "FASTCONV_CUDA=0"
    home, reason = find_cuda_home(), ""
    if home is None:
        reason = "no CUDA compiler found; install the CUDA toolkit (nvcc and headers) or set CUDA_HOME to it"
    elif torch.version.cuda is None:
        reason = "this torch was built without CUDA; install a CUDA build of torch"
    elif cuda_release(home).split(".")[0] != torch.version.cuda.split(".")[0]:
        reason = (
            f"nvcc {cuda_release(home)} in {home} does not match torch's CUDA {torch.version.cuda}; "
            f"install CUDA toolkit {torch.version.cuda.split('.')[0]}.x or set CUDA_HOME to one"
        )
    if reason and wish == "1":
        raise SystemExit(f"fastconv: FASTCONV_CUDA=1, but the CUDA kernels cannot be built: {reason}")
    return (None, reason) if reason else (home, "")


def cuda_archs(torch) -> str:
    named = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if named:
        return named
    if torch.cuda.is_available():
        found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        found = {capability for capability in found if capability >= (8, 0)}  # the kernels need mma.sync with bf16
        if found:
            return ";".join(f"{a}.{b}{'a' if a == 9 else ''}" for a, b in sorted(found))
    return DEFAULT_ARCHS


def pip_cuda_includes() -> list[str]:
    """Header folders of the nvidia pip packages: c10 and ATen include cuBLAS, cuSPARSE and cuDNN headers from there."""
    try:
        import nvidia
    except ImportError:
        return []
    found = []
    for base in nvidia.__path__:
        found += sorted(glob.glob(os.path.join(base, "*", "include")))
    return found


def extension():
    """(ext_modules, cmdclass); both empty where nothing can be compiled, with a sentence that says why."""
    compiler = cxx_compiler()
    if compiler is None:
        say("no C++ compiler found: installing the pure-Python part only (install g++ and reinstall for the kernels)")
        return [], {}
    os.environ.setdefault("CXX", compiler)
    try:
        import torch
    except ImportError:
        say("torch is not there at build time: installing the pure-Python part only (install torch, then reinstall)")
        return [], {}
    os.chdir(ROOT)
    sources = sorted(glob.glob("csrc/*.cpp") + glob.glob("csrc/host/*.cpp") + glob.glob("csrc/cpu/*.cpp"))
    cuda_sources = sorted(glob.glob("csrc/cuda/*.cu") + glob.glob("csrc/cuda/*.cpp"))
    if not sources or not cuda_sources:
        raise SystemExit("fastconv: csrc/ lacks C++ or CUDA sources; this source tree is not complete")
    home, reason = decide_cuda(torch)
    if home is not None:
        os.environ["CUDA_HOME"] = str(home)  # before cpp_extension is imported: it reads it once
        os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_archs(torch)
    else:
        say(f"building without the CUDA kernels: {reason}")
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    cxx_flags = ["-O3", "-std=c++17", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-g0"]
    nvcc_flags = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-lineinfo"]
    macros = [("FASTCONV_CUDA_REASON", f'"{reason}"')]
    include = [str(ROOT / "csrc")]
    cls = CppExtension
    if home is not None:
        cls = CUDAExtension
        sources += cuda_sources
        include += pip_cuda_includes()
        macros += [("FASTCONV_WITH_CUDA", "1"), ("FASTCONV_CUDA_ARCHS", f'"{os.environ["TORCH_CUDA_ARCH_LIST"]}"')]
    ext = cls(
        "fastconv._C",
        sources,
        include_dirs=include,
        define_macros=macros,
        extra_compile_args={"cxx": cxx_flags, "nvcc": nvcc_flags},
        extra_link_args=["-fopenmp", "-Wl,--build-id=sha1"],  # csrc/build_id.h reads it
    )
    return [ext], {"build_ext": BuildExtension}


if __name__ == "__main__":
    EXT_MODULES, CMDCLASS = extension()
    setup(ext_modules=EXT_MODULES, cmdclass=CMDCLASS)
