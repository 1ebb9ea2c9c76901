"""Which backend runs a call: choice, refusal with a reason, logged fallback, life without the extension."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastconv
import fastconv.functional as FF

ROOT = Path(fastconv.__file__).parent.parent
NEEDS_CPU = pytest.mark.skipif(
    not fastconv.backends()["cpu"], reason=f"backend cpu: {fastconv.backends()['cpu'].reason}"
)


class Namespaces(TorchDispatchMode):
    """The names of the raw fastconv operators that ran."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastconv":
            self.ran.append(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


def every_call():
    """One small call of every functional operator."""
    x, w = torch.randn(2, 4, 6, 6), torch.randn(8, 4, 3, 3)
    norm = (torch.zeros(8), torch.ones(8))
    yield "conv2d_bias_act", lambda: FF.conv2d_bias_act(x, w)
    yield "conv2d_bn_act", lambda: FF.conv2d_bn_act(x, w, None, *norm, None, None)
    yield "batch_norm_act", lambda: FF.batch_norm_act(x, norm[0][:4], norm[1][:4])
    yield "max_pool2d", lambda: FF.max_pool2d(x, 2)
    yield "avg_pool2d", lambda: FF.avg_pool2d(x, 2)
    yield "adaptive_avg_pool2d", lambda: FF.adaptive_avg_pool2d(x, 1)
    yield "cross_entropy", lambda: FF.cross_entropy(x.flatten(1), torch.tensor([1, 2]))


def test_backends_tells_every_name_and_reason():
    found = fastconv.backends()
    assert list(found) == ["cuda", "triton", "cpu", "aten"]
    assert found["aten"].available and bool(found["aten"])
    for state in found.values():
        assert isinstance(state.available, bool) and len(state.reason) > 10 and "\n" not in state.reason
    found.clear()
    assert fastconv.backends(), "a copy is returned"


def test_use_backend_sets_and_context_restores():
    assert fastconv.ops.current_backend() == "auto"
    with fastconv.use_backend("aten"):
        assert fastconv.ops.current_backend() == "aten"
        with fastconv.use_backend("auto"):
            assert fastconv.ops.current_backend() == "auto"
        assert fastconv.ops.current_backend() == "aten"
        with pytest.raises(KeyError), fastconv.use_backend("auto"):
            raise KeyError
        assert fastconv.ops.current_backend() == "aten", "an exception inside restores as well"
    assert fastconv.ops.current_backend() == "auto"
    fastconv.use_backend("aten")
    assert fastconv.ops.current_backend() == "aten"


def test_unknown_and_unavailable_names():
    for name in ("cudnn", "", None, "CPU"):
        with pytest.raises(ValueError, match="use_backend: name expected one of auto, cuda, triton, cpu, aten; got"):
            fastconv.use_backend(name)
    missing = [n for n, state in fastconv.backends().items() if not state]
    for name in missing:
        with pytest.raises(RuntimeError) as error:
            fastconv.use_backend(name)
        assert f"backend '{name}' is not available: {fastconv.backends()[name].reason}" in str(error.value)
    assert fastconv.ops.current_backend() == "auto", "a refused choice changes nothing"


@NEEDS_CPU
@pytest.mark.parametrize(("name", "expected"), (("auto", True), ("cpu", True), ("aten", False)))
def test_the_chosen_backend_runs(name, expected):
    with fastconv.use_backend(name):
        for op, call in every_call():
            with Namespaces() as seen:
                call()
            assert (op in seen.ran) is expected, f"{op} on {name}: ran {seen.ran}"


@NEEDS_CPU
def test_backward_stays_on_the_backend_of_the_forward():
    x, w = torch.randn(2, 4, 6, 6, requires_grad=True), torch.randn(8, 4, 3, 3, requires_grad=True)
    with fastconv.use_backend("cpu"):
        out = FF.conv2d_bias_act(x, w)
    with fastconv.use_backend("aten"), Namespaces() as seen:
        out.sum().backward()
    assert "conv2d_backward" in seen.ran and "act_bias_backward" in seen.ran


REFUSED = (
    ("return_indices", lambda: FF.max_pool2d(torch.randn(1, 1, 4, 4), 2, return_indices=True), "return_indices"),
    ("window", lambda: FF.max_pool2d(torch.randn(1, 1, 20, 20), 17), "17x17"),
    ("integers", lambda: FF.max_pool2d(torch.ones(1, 1, 4, 4, dtype=torch.int32), 2), "torch.int32"),
    ("empty_norm", lambda: FF.batch_norm_act(torch.randn(0, 3, 2, 2), torch.zeros(3), torch.ones(3)), "empty"),
    ("sparse", lambda: FF.adaptive_avg_pool2d(torch.randn(1, 3, 2, 2), (0, 1)), "empty"),
    ("mixed_loss", lambda: FF.cross_entropy(torch.randn(3, 4), torch.randn(3, 4).double()), "target has dtype"),
)


@NEEDS_CPU
@pytest.mark.parametrize(("call", "reason"), [c[1:] for c in REFUSED], ids=[c[0] for c in REFUSED])
def test_an_explicit_backend_that_cannot_run_raises_and_auto_falls_back(call, reason, caplog):
    with (
        fastconv.use_backend("cpu"),
        pytest.raises(RuntimeError, match=f"backend 'cpu' cannot run this call: .*{reason}"),
    ):
        call()
    caplog.set_level(logging.INFO, "fastconv")
    for _ in range(3):
        call()
    told = [r for r in caplog.records if r.name == "fastconv"]
    assert len(told) == 1, "an automatic fallback is logged once"
    assert "runs on aten" in told[0].getMessage() and reason in told[0].getMessage()


def test_meta_tensors_run_on_aten():
    out = FF.conv2d_bias_act(torch.randn(2, 4, 6, 6, device="meta"), torch.randn(8, 4, 3, 3, device="meta"))
    assert out.device.type == "meta" and out.shape == (2, 8, 4, 4)


def test_torch_func_transforms():
    """vmap, grad and jvp need PyTorch's own rules: under auto they fall to aten and work."""
    x, w = torch.randn(3, 2, 4, 6, 6).double(), torch.randn(8, 4, 3, 3).double()
    mapped = torch.func.vmap(lambda t: FF.conv2d_bias_act(t, w))(x)
    torch.testing.assert_close(mapped, torch.stack([F.conv2d(t, w).relu() for t in x]))
    grad = torch.func.grad(lambda t: FF.conv2d_bias_act(x[0], t, activation="tanh").sum())(w)
    leaf = w.clone().requires_grad_()
    F.conv2d(x[0], leaf).tanh().sum().backward()
    torch.testing.assert_close(grad, leaf.grad)
    _, tangent = torch.func.jvp(lambda t: FF.avg_pool2d(t, 2), (x[0],), (torch.ones_like(x[0]),))
    torch.testing.assert_close(tangent, torch.ones_like(tangent))


def test_forward_mode_differentiation():
    x = torch.randn(2, 4, 6, 6)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        out = torch.autograd.forward_ad.unpack_dual(FF.avg_pool2d(dual, 2))
    assert out.tangent is not None and torch.allclose(out.tangent, torch.ones_like(out.tangent))


def test_tensor_subclass_keeps_its_class():
    class Named(torch.Tensor):
        pass

    out = FF.max_pool2d(torch.randn(1, 2, 4, 4).as_subclass(Named), 2)
    assert type(out) is Named


def test_double_backward_under_aten():
    """The way out that the once-differentiable Functions name."""
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    with fastconv.use_backend("aten"):
        assert torch.autograd.gradgradcheck(lambda a, b: FF.conv2d_bias_act(a, b, activation="tanh"), (x, w))


WITHOUT_EXTENSION = r"""
import importlib.machinery, sys
real = importlib.machinery.PathFinder.find_spec.__func__
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, path=None, target=None: None if name in ("_C", "fastconv._C") else real(cls, name, path, target))
import warnings
warnings.simplefilter("error")
import torch, fastconv, fastconv.functional as FF, fastconv.nn as fnn
state = fastconv.backends()["cpu"]
assert not state and not fastconv.backends()["cuda"] and fastconv.backends()["aten"]
print("REASON:", state.reason)
try:
    fastconv.use_backend("cpu")
except RuntimeError as error:
    print("ERROR:", error)
torch.manual_seed(0)
net = torch.nn.Sequential(fnn.Conv2dBiasReLU(3, 8, 3), fnn.BatchNormAct2d(8), fnn.MaxPool2d(2), fnn.AvgPool2d(2),
                          fnn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
step = fastconv.TrainStep(net, fnn.CrossEntropyLoss(), torch.optim.SGD(net.parameters(), 0.1))
x, t = torch.randn(4, 3, 12, 12), torch.tensor([0, 1, 2, 3])
losses = [step(x, t).item() for _ in range(5)]
assert losses[-1] < losses[0]
w = torch.randn(8, 3, 3, 3)
FF.conv2d_bn_act(x, w, None, torch.zeros(8), torch.ones(8), None, None)
assert not hasattr(torch.ops.fastconv, "conv2d_bias_act")
print("ALL RAN")
"""


def run(code: str, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *args, *(["-c", code] if code else [])], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_without_the_compiled_extension():
    """The pure-Python part imports, says one sentence that tells what to do, and runs everything on aten."""
    done = run(WITHOUT_EXTENSION)
    assert done.returncode == 0, done.stderr
    assert "ALL RAN" in done.stdout and done.stderr == ""
    reason = next(line for line in done.stdout.splitlines() if line.startswith("REASON:"))
    assert "without its compiled extension" in reason and "install" in reason
    assert f"backend 'cpu' is not available: {reason.removeprefix('REASON: ')}" in done.stdout


def test_an_extension_that_does_not_load_warns_once(tmp_path):
    """Built for another torch, say: that is no choice, so importing fastconv says so, and still works."""
    code = (
        "import importlib.machinery as m, sys\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "import fastconv, torch\n"
        "print(fastconv.backends()['cpu'].reason)\n"
        "print(fastconv.functional.max_pool2d(torch.zeros(1, 1, 2, 2), 2).shape)\n"
    )
    package = tmp_path / "fastconv"
    package.mkdir()
    for source in (ROOT / "fastconv").rglob("*.py"):
        target = package / source.relative_to(ROOT / "fastconv")
        target.parent.mkdir(exist_ok=True, parents=True)
        target.write_text(source.read_text())
    (package / f"_C{__import__('sysconfig').get_config_var('EXT_SUFFIX')}").write_bytes(b"not a shared object")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("UserWarning") == 1 and "cannot be loaded with torch" in done.stderr
    assert "reinstall fastconv" in done.stdout and "torch.Size([1, 1, 1, 1])" in done.stdout


INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16")


@NEEDS_CPU
@pytest.mark.parametrize("isa", INSTRUCTION_SETS[:-1])
def test_lower_instruction_sets(isa):
    """The kernels are compiled once per instruction set; the ones this machine would not choose are tested here."""
    active = fastconv._ext.build_info()["cpu_isa"]
    if INSTRUCTION_SETS.index(isa) >= INSTRUCTION_SETS.index(active):
        pytest.skip(f"{active} is what this process tests, or the most that this machine has")
    names = ("random", "conv2d_bias_act", "batch_norm_act", "cross_entropy", "pooling", "tiles")
    files = [f"tests/test_{n}.py" for n in names]
    chosen = "test_tiles or cpu and (test_random or test_activations or test_class_indices or test_dtypes)"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", chosen]
    environment = os.environ | {"FASTCONV_CPU_ISA": isa}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stdout[-5000:]}"
    assert " passed" in done.stdout and "failed" not in done.stdout


@NEEDS_CPU
def test_choice_of_instruction_set():
    code = "import fastconv; print(fastconv.backends()['cpu'].reason)"
    results = []
    for isa in ("sse9", "portable"):
        environment = os.environ | {"FASTCONV_CPU_ISA": isa}
        command = [sys.executable, "-c", code]
        results.append(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment))
    assert results[0].returncode != 0
    assert "FASTCONV_CPU_ISA: expected one of portable, avx2, avx512" in results[0].stderr
    assert "portable" in results[1].stdout, results[1].stderr


def test_info_command():
    done = run("", "-m", "fastconv", "info")
    assert done.returncode == 0, done.stderr
    for text in (f"fastconv version: {fastconv.__version__}", f"PyTorch version: {torch.__version__}", "Backends:",
                 "Compiled extension:", "CPU: ", "Python version: "):  # fmt: skip
        assert text in done.stdout
    for name, state in fastconv.backends().items():
        line = next(row for row in done.stdout.splitlines() if row.strip().startswith(f"{name} "))
        assert ("not available" in line) is not state.available and state.reason in line


def test_version_and_public_names():
    assert fastconv.__version__ == __import__("fastconv._version").__version__
    for name in ("TrainStep", "backends", "functional", "fuse", "fusion_report", "nn", "use_backend"):
        assert name in fastconv.__all__ and hasattr(fastconv, name)
    for module in (fastconv.functional, fastconv.nn):
        assert all(hasattr(module, n) for n in module.__all__)
