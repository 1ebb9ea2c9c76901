"""One suite over every backend: the ``backend`` fixture runs a test once per name of fastconv.backends()."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

# Threads that wait sleep instead of spinning: the suite shares its cores with whatever else runs there. Before torch.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# What was measured on this machine must not decide what the suite runs; the tests of the choice set it themselves.
os.environ.setdefault("FASTCONV_TUNE", "0")
# The assertions of these helpers show what was compared, as those of the tests do. Before they are imported.
pytest.register_assert_rewrite("dynamo_util", "fuse_util", "plan_ops_util", "plan_util", "simt_conv", "simt_norm")
import fuse_models  # noqa: E402
import simt_backend  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

import fastconv  # noqa: E402
from fastconv._plan import evaluation, gradients  # noqa: E402
from fastconv.ops import choice, keys, registry  # noqa: E402
from fastconv.ops import measure as measuring  # noqa: E402


@dataclass(frozen=True)
class Backend:
    """A backend that can run here, and the device its tests put their tensors on."""

    name: str
    device: str

    @property
    def fp64(self) -> bool:
        """Whether it runs float64 (the GPU kernels leave it to aten): gradcheck and exact comparisons need it."""
        return self.name in ("aten", "cpu")

    @property
    def fused(self) -> bool:
        """Whether fastconv's own kernels run (aten is stock PyTorch)."""
        return self.name != "aten"


@pytest.fixture(autouse=True)
def clean_state() -> Iterator[None]:
    """Same seed and threads for every test; the backend choice, the threads and what was logged do not leak.

    fp32 is exact on every backend. TF32, which torch's default allows, is 1000 times coarser, and whether stock takes it
    is cuDNN's choice shape by shape: twice stock's error would be no bound for it. test_tf32.py has its tests.
    """
    torch.manual_seed(0)
    before, told, threads = fastconv.ops.current_backend(), set(registry._told), torch.get_num_threads()
    torch.set_num_threads(2)
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        yield
    torch.set_num_threads(threads)
    fastconv.use_backend(before)
    registry._told.clear()
    registry._told.update(told)


def pytest_runtest_setup(item: pytest.Item) -> None:
    # A skip raised here, and not in the fixture, is reported as one counted line per backend and reason.
    for fixture in ("backend", "kernels", "planner"):
        name = getattr(item, "callspec", None) and item.callspec.params.get(fixture)
        if name == "simt":
            missing = simt_backend.add()
            if missing:
                pytest.skip(f"backend simt: {missing}")
        elif name and not fastconv.backends()[name]:
            pytest.skip(f"backend {name}: {fastconv.backends()[name].reason}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    try:
        return (yield)
    except RuntimeError as error:
        if os.environ.get("TRITON_INTERPRET") == "1" and "Triton's interpreter" in str(error):
            pytest.skip(str(error))  # the backend names what its interpreter gets wrong; a GPU runs these tests
        if simt_backend.TOO_LARGE in str(error):
            pytest.skip(f"backend simt: {simt_backend.TOO_LARGE}")
        raise


@pytest.fixture(params=["aten", "cpu", "cuda", "triton", "simt"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Chooses the backend explicitly, so that a call that it cannot run raises instead of falling back unseen.

    simt: the CUDA operators, host side and kernels, over CPU tensors in the emulator of tests/simt.
    """
    name = request.param
    with fastconv.use_backend(name):
        # With TRITON_INTERPRET=1 the Triton kernels run on CPU tensors.
        gpu = name == "cuda" or (name == "triton" and torch.cuda.is_available())
        yield Backend(name, "cuda" if gpu else "cpu")


@pytest.fixture(params=["cpu", "cuda"])
def kernels(request: pytest.FixtureRequest) -> Backend:
    """A device with compiled kernels, for tests of the raw operators."""
    return Backend(request.param, request.param)


@dataclass(frozen=True)
class Planner:
    """Whose kernels a TrainStep's plan runs, and the arguments that ask for one there."""

    name: str
    options: dict

    @property
    def gpu(self) -> bool:
        return self.name != "cpu"


@pytest.fixture(params=["cpu", "simt", "cuda"])
def planner(request: pytest.FixtureRequest) -> Iterator[Planner]:
    """Plans of each kind; new tensors are made on the device that they run on."""
    name = request.param
    with fastconv.use_backend(name), torch.device("cuda" if name == "cuda" else "cpu"):
        yield Planner(name, {"plan": True} if name == "cuda" else {})


@pytest.fixture
def net() -> nn.Module:
    """A small residual network of stock layers."""
    torch.manual_seed(3)
    return fuse_models.Net().double()


@pytest.fixture
def pair(net) -> tuple[nn.Module, nn.Module]:
    """(fused, stock), equal and apart."""
    return fastconv.fuse(copy.deepcopy(net)), net


@pytest.fixture
def runs(monkeypatch) -> list:
    """The programs of a fused model's evaluation that ran, in order."""
    seen, real = [], evaluation.EvaluationPlan.run
    monkeypatch.setattr(evaluation.EvaluationPlan, "run", lambda plan, x: seen.append(plan) or real(plan, x))
    return seen


@pytest.fixture
def trained(monkeypatch) -> list:
    """The programs of a fused model's training that ran forward, in order."""
    seen, real = [], gradients.GradientPlan.run
    monkeypatch.setattr(gradients.GradientPlan, "run", lambda plan, x: seen.append(plan) or real(plan, x))
    return seen


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Iterator[None]:
    """Measures at first use, into a folder of this test."""
    monkeypatch.setenv("FASTCONV_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("FASTCONV_TUNE", "1")
    monkeypatch.setitem(measuring.SECONDS, "cpu", 0.0)
    choice.forget()
    yield
    choice.forget()


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """The classes of calls measured in this test."""
    seen, real = [], choice.measure

    def note(op, names, run, tensors, settings, seconds=None):
        seen.append(keys.class_of(op, [keys.spec(t) for t in tensors], settings))
        return real(op, names, run, tensors, settings, seconds)

    monkeypatch.setattr(choice, "measure", note)
    return seen
