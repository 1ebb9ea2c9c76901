"""setup.py's decisions: the CUDA toolkit behind a wrapper, FASTCONV_CUDA, architectures, and no compiler at all."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _load(name: str):
    spec = importlib.util.spec_from_file_location(f"fastconv_{name}", ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup_py():
    return _load("setup")


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """A toolkit in a place of its own, and in PATH only a wrapper around its nvcc."""
    home = tmp_path / "opt" / "cuda-13.0"
    (home / "bin").mkdir(parents=True)
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime.h").write_text("")
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        f"case $1 in --version) echo 'Cuda compilation tools, release 13.0, V13.0.88';; "
        f"--dryrun) echo '#$ TOP={home}/bin/..' >&2;; esac\n"
    )
    nvcc.chmod(0o755)
    path = tmp_path / "path"
    path.mkdir()
    wrapper = path / "nvcc"
    wrapper.write_text(f'#!/bin/sh\nexec {nvcc} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path}:/usr/bin:/bin")
    for name in ("CUDA_HOME", "CUDA_PATH", "FASTCONV_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return home


def _torch(cuda: str | None = "13.0", capabilities=()):
    return SimpleNamespace(
        version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(
            is_available=lambda: bool(capabilities),
            device_count=lambda: len(capabilities),
            get_device_capability=lambda i: capabilities[i],
        ),
    )


def test_toolkit_is_found_through_a_wrapper(setup_py, toolkit):
    assert setup_py.find_cuda_home() == toolkit
    assert setup_py.cuda_release(toolkit) == "13.0"


def test_wrong_cuda_home_is_named_and_passed_over(setup_py, toolkit, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    assert setup_py.find_cuda_home() == toolkit
    assert "CUDA_HOME=/nowhere holds no bin/nvcc" in capsys.readouterr().err


def test_cuda_is_taken_when_there(setup_py, toolkit):
    assert setup_py.decide_cuda(_torch()) == (toolkit, "")


def test_fastconv_cuda_0_leaves_it_out(setup_py, toolkit, monkeypatch):
    monkeypatch.setenv("FASTCONV_CUDA", "0")
    assert setup_py.decide_cuda(_torch()) == (None, "FASTCONV_CUDA=0")


@pytest.mark.parametrize(
    "torch, text",
    [
        (_torch(cuda=None), "this torch was built without CUDA; install a CUDA build of torch"),
        (_torch(cuda="12.8"), "does not match torch's CUDA 12.8; install CUDA toolkit 12.x"),
    ],
)
def test_reasons_against_cuda(setup_py, toolkit, monkeypatch, torch, text):
    home, reason = setup_py.decide_cuda(torch)
    assert home is None and text in reason
    monkeypatch.setenv("FASTCONV_CUDA", "1")
    with pytest.raises(SystemExit, match="FASTCONV_CUDA=1, but the CUDA kernels cannot be built") as error:
        setup_py.decide_cuda(torch)
    assert text in str(error.value)


def test_no_cuda_compiler_says_what_to_install(setup_py, toolkit, monkeypatch):
    monkeypatch.setattr(setup_py, "find_cuda_home", lambda: None)
    monkeypatch.setenv("FASTCONV_CUDA", "1")
    with pytest.raises(SystemExit, match="install the CUDA toolkit"):
        setup_py.decide_cuda(_torch())


def test_fastconv_cuda_takes_0_or_1_only(setup_py, toolkit, monkeypatch):
    monkeypatch.setenv("FASTCONV_CUDA", "yes")
    with pytest.raises(SystemExit, match="FASTCONV_CUDA expected 0 or 1, got 'yes'"):
        setup_py.decide_cuda(_torch())


def test_architectures(setup_py, toolkit, monkeypatch):
    assert setup_py.cuda_archs(_torch()) == "8.0;9.0a;10.0;12.0"
    assert setup_py.cuda_archs(_torch(capabilities=[(9, 0)])) == "9.0a"
    assert setup_py.cuda_archs(_torch(capabilities=[(8, 6), (8, 0), (8, 6)])) == "8.0;8.6"
    # older GPUs cannot run the kernels, and must not stop their machine from installing the rest
    assert setup_py.cuda_archs(_torch(capabilities=[(7, 5), (8, 6)])) == "8.6"
    assert setup_py.cuda_archs(_torch(capabilities=[(7, 0)])) == "8.0;9.0a;10.0;12.0"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    assert setup_py.cuda_archs(_torch(capabilities=[(9, 0)])) == "7.5"


def test_an_isolated_build_uses_the_target_environments_torch():
    backend = _load("build_backend")
    assert backend.get_requires_for_build_wheel() == []  # torch is installed in the environment that runs this test
    backend._SITE[:] = ["/nowhere"]
    asked = backend.get_requires_for_build_wheel()
    assert any(line.startswith("torch==2.11.0") for line in asked)


def test_without_a_compiler_the_python_part_installs_and_says_so(tmp_path):
    env = {**os.environ, "CXX": "no-such-compiler", "PYTHONPATH": ""}
    command = [sys.executable, "setup.py", "build_py", "--build-lib", str(tmp_path), "egg_info", "-e", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "no C++ compiler found: installing the pure-Python part only" in built.stderr
    code = (
        "import torch, fastconv, fastconv.functional as FF\n"
        f"assert fastconv.__file__.startswith({str(tmp_path)!r}), fastconv.__file__\n"
        "assert not fastconv.backends()['cpu'] and fastconv.backends()['aten']\n"
        "print(fastconv.backends()['cpu'].reason)\n"
        "x = torch.randn(2, 3, 8, 8)\n"
        "assert torch.equal(FF.max_pool2d(x, 2), torch.nn.functional.max_pool2d(x, 2))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**env, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("\n") == 1 and "installed without its compiled extension" in ran.stdout
