"""Deferred normalisation: fuse(model, defer_bn=...) and conv2d_bn_act(recompute=True) keep less, gradients unchanged."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from fuse_models import ACTS, Block, Net, Residual, X, iadd
from fuse_util import assert_same, image, one_thread  # noqa: F401
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastconv
import fastconv.functional as FF


@pytest.fixture(autouse=True)
def cpu_kernels() -> None:
    if not fastconv.backends()["cpu"]:
        pytest.skip(f"backend cpu: {fastconv.backends()['cpu'].reason}")


def kept(run, model: nn.Module) -> tuple[int, Tensor]:
    """(bytes that autograd holds after run(), weights apart; what it returned)."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    return sum(found.values()), out


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    model(x).square().sum().backward()
    return [x.grad, *(p.grad for p in model.parameters())]


def pair(model: nn.Module, option: bool | str = True) -> tuple[nn.Module, nn.Module]:
    """The model fused without and with deferral."""
    return fastconv.fuse(copy.deepcopy(model)), fastconv.fuse(copy.deepcopy(model), defer_bn=option)


def assert_bitwise(plain: nn.Module, deferred: nn.Module, x: Tensor) -> None:
    for got, wanted in zip(gradients(deferred, x), gradients(plain, x), strict=True):
        assert torch.equal(got, wanted)
    for got, wanted in zip(deferred.buffers(), plain.buffers(), strict=True):
        assert torch.equal(got, wanted)


def deferred_groups(model: nn.Module) -> list[str]:
    return [g.members[0] for g in fastconv.fusion_report(model).groups if g.deferred]


def chain(act: nn.Module | None = None, **options) -> nn.Module:
    act = act or nn.ReLU()
    return nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, **options), act,
        Residual(iadd, copy.deepcopy(act)), Residual(iadd, copy.deepcopy(act)), nn.Conv2d(4, 3, 1), nn.ReLU(),
    ).double()  # fmt: skip


@pytest.mark.parametrize("name", ACTS)
def test_gradients_are_the_same(name: str) -> None:
    plain, deferred = pair(chain(ACTS[name]))
    assert deferred_groups(deferred) == ["0", "3.conv", "4.conv"]
    assert_bitwise(plain, deferred, image(2, 4, 6, 5))
    assert_same(chain(ACTS[name]), image(2, 4, 6, 5), defer_bn=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}])
def test_dtypes_and_norm_options(dtype: torch.dtype, options: dict) -> None:
    plain, deferred = pair(chain(**options).to(dtype))
    assert_bitwise(plain, deferred, image(2, 4, 6, 5).to(dtype))


@pytest.mark.parametrize("option", [True, "auto"])
def test_resnet50_keeps_less(option: bool | str) -> None:
    """The sizes do not depend on the number format: at most 0.6 of what the stock step keeps."""
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    stock = models.ResNet(models.resnet.Bottleneck, [3, 4, 6, 3], 10, width_per_group=16)
    plain, deferred = pair(stock, option)
    x, y = image(4, 3, 64, 64).float(), torch.arange(4)
    sizes = {}
    for name, model in (("stock", stock), ("plain", plain), ("deferred", deferred)):
        sizes[name], loss = kept(lambda m=model: F.cross_entropy(m(x), y), model)
        loss.backward()
    assert sizes["deferred"] <= 0.6 * sizes["stock"] and sizes["deferred"] <= 0.6 * sizes["plain"], sizes
    for p, q in zip(deferred.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


class Readers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv(x)))
        z = F.relu(self.bn2(self.conv2(y)))  # both are read by a convolution; z by a sigmoid as well
        return F.relu(self.bn3(self.conv3(z)) + y) * torch.sigmoid(z)


def test_auto_leaves_what_others_keep() -> None:
    plain, deferred = pair(Readers().double(), "auto")
    assert deferred_groups(deferred) == ["conv"]
    assert_bitwise(plain, deferred, image(2, 4, 6, 5))
    plain, deferred = pair(Readers().double(), True)
    assert deferred_groups(deferred) == ["conv", "conv2", "conv3"]
    assert_bitwise(plain, deferred, image(2, 4, 6, 5))
    assert deferred_groups(plain) == []


def test_option_stays_with_the_model() -> None:
    import pickle

    model = fastconv.fuse(Net(), defer_bn=True)
    wanted = deferred_groups(model)
    assert len(wanted) == 9
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert deferred_groups(twin) == wanted
    model.blocks[0].conv1 = nn.Conv2d(4, 4, 3, padding=1)  # the plan is derived anew
    model(image(*X).float())
    assert deferred_groups(model) == wanted
    # fuse() again with another option changes it, without touching the first.
    again = fastconv.fuse(model)
    assert deferred_groups(again) == [] and deferred_groups(model) == wanted
    with pytest.raises(ValueError, match="fuse: defer_bn expected False, True or 'auto', got 'yes'"):
        fastconv.fuse(Net(), defer_bn="yes")


def layer(generator_seed: int = 0):
    g = torch.Generator().manual_seed(generator_seed)
    weight = torch.randn(4, 4, 3, 3, dtype=torch.float64, generator=g).requires_grad_()
    scale, shift = torch.rand(2, 4, dtype=torch.float64, generator=g).add(0.5).unbind()
    return [weight, scale.clone().requires_grad_(), shift.clone().requires_grad_()]


def call(x: Tensor, parameters: list[Tensor], recompute: bool, **options) -> Tensor:
    weight, scale, shift = parameters
    return FF.conv2d_bn_act(
        x, weight, None, None, None, scale, shift, padding=1, training=True, recompute=recompute, **options
    )


def results(step, *leaves: Tensor, **options) -> list[list[Tensor]]:
    return [list(torch.autograd.grad(step(flag).square().sum(), leaves, **options)) for flag in (False, True)]


def assert_equal(plain: list[Tensor], deferred: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(plain, deferred, strict=True))


def test_result_changed_in_place_or_viewed() -> None:
    """Another version, a view or a detached copy is not the group's result: readers keep what they saw."""
    a, b, x = layer(1), layer(2), image(2, 4, 6, 5)

    def added(flag: bool) -> Tensor:
        y = call(x, a, flag, activation="identity")
        return call(y.add_(1), b, flag)

    def unseen(flag: bool) -> Tensor:
        y = call(x, a, flag, activation="identity")
        with torch.no_grad():
            y.mul_(2)  # leaves no trace in the graph but the version
        return call(y, b, flag)

    def viewed(flag: bool) -> Tensor:
        return call(call(x, a, flag)[:, :, 1:], b, flag)

    def detached(flag: bool) -> Tensor:
        y = call(x, a, flag)
        return call(y.detach(), b, flag) + y

    def afterwards(flag: bool) -> Tensor:
        y = call(x, a, flag, activation="identity")
        z = call(y, b, flag)
        if flag:
            with torch.no_grad():
                y.zero_()  # not kept: what the reader saw is computed again
        return z

    for step in (added, unseen, viewed, detached, afterwards):
        assert_equal(*results(step, *a, *b))


def test_parameters_changed_in_place_before_the_backward() -> None:
    for changed in range(3):
        a, b = layer(1), layer(2)
        loss = call(call(image(2, 4, 6, 5), a, True), b, True).sum()
        with torch.no_grad():
            a[changed].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_several_readers_and_backwards() -> None:
    a, b, c, x = layer(1), layer(2), layer(3), image(2, 4, 6, 5).requires_grad_()

    def fork(flag: bool) -> Tensor:
        y = call(x, a, flag)
        return call(y, b, flag, residual=y) + call(y, c, flag) + call(y, b, flag)

    assert_equal(*results(fork, x, *a, *b, *c))
    for flag in (False, True):  # twice through the same graph, then once more without it
        y = fork(flag)
        first = torch.autograd.grad(y.sum(), [x, *a], retain_graph=True)
        assert_equal(list(first), list(torch.autograd.grad(y.sum(), [x, *a])))
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(y.sum(), [x])

    def parts(flag: bool) -> list[Tensor]:
        y = call(x, a, flag)
        left, right = call(y, b, flag).sum(), call(y, c, flag).sum()
        only = torch.autograd.grad(left, [b[0]], retain_graph=True)  # stops short of the first group
        left.backward(retain_graph=True)
        right.backward()
        grads = [*only, *(t.grad.clone() for t in (x, *a, *b, *c))]
        for t in (x, *a, *b, *c):
            t.grad = None
        return grads

    assert_equal(parts(False), parts(True))


def test_frozen_parameters_and_evaluation() -> None:
    for frozen in ("0", "1", "3.conv", "3.bn", "4"):
        model = chain()
        model.get_submodule(frozen).requires_grad_(False)
        plain, deferred = pair(model)
        for m in (plain, deferred):
            m(image(2, 4, 6, 5)).sum().backward()
        for p, q in zip(deferred.parameters(), plain.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None) and (p.grad is None or torch.equal(p.grad, q.grad))
    plain, deferred = pair(chain())
    for m in (plain, deferred):
        m[3].bn.eval()  # normalises with its running statistics: kept as ever
    assert_bitwise(plain, deferred, image(2, 4, 6, 5))
    assert_bitwise(plain.eval(), deferred.eval(), image(2, 4, 6, 5))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    """A checkpoint around one block, with deferred results that come in and go out."""
    grads = []
    for flag in (False, True):
        torch.manual_seed(5)
        model = fastconv.fuse(nn.Sequential(Block(), Block(), Block()).double(), defer_bn=flag)
        x = image(2, 4, 6, 5).requires_grad_()
        y = checkpoint(model[1], model[0](x), use_reentrant=reentrant)
        model[2](y).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters())])
    assert_equal(*grads)


def test_saved_tensor_hooks_see_what_is_kept() -> None:
    plain, deferred = pair(chain())
    with torch.autograd.graph.save_on_cpu():
        assert_bitwise(plain, deferred, image(2, 4, 6, 5))


def test_autocast() -> None:
    plain, deferred = pair(chain().float())
    with torch.autocast("cpu", torch.bfloat16):
        outs = [m(image(2, 4, 6, 5).float()) for m in (plain, deferred)]
    for out in outs:
        out.float().square().sum().backward()
    for p, q in zip(deferred.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_second_derivatives_are_refused() -> None:
    a, b = layer(1), layer(2)
    x = image(2, 4, 6, 5).requires_grad_()
    b[0].requires_grad_(False)
    for t in b[1:]:
        t.requires_grad_(False)
    y = call(call(x, a, True), b, True)
    (grad,) = torch.autograd.grad(y.sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.square().sum().backward()


def test_memory_goes_with_the_graph() -> None:
    """No reference cycle holds a step's tensors: they are gone when the graph is, without the garbage collector."""
    a, b = layer(1), layer(2)
    gc.disable()
    try:
        for backward in (False, True):
            y = call(image(2, 4, 6, 5), a, True)
            z = call(y, b, True)
            node = weakref.ref(y.grad_fn)
            if backward:
                z.sum().backward()
                assert node().value is None and node().kept is None
            del y, z
            assert node() is None
    finally:
        gc.enable()


def test_long_chains_do_not_recurse() -> None:
    x = image(2, 4, 3, 3)
    parameters = layer(1)
    y = x
    for _ in range(1500):
        y = call(y, parameters, True, residual=y, activation="identity")
    y.sum().backward()
    assert parameters[0].grad.isfinite().all()


def test_compiled_models_plan_by_themselves() -> None:
    plain, deferred = pair(chain())
    compiled = torch.compile(deferred, backend="aot_eager")
    for got, wanted in zip(gradients(compiled, image(2, 4, 6, 5)), gradients(plain, image(2, 4, 6, 5)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_training_plan_of_a_deferred_model() -> None:
    """A plan keeps what its memory layout says, so TrainStep runs such a model as a loop; the losses are the same."""
    losses = []
    for flag in (False, True):
        torch.manual_seed(3)
        model = fastconv.fuse(nn.Sequential(chain().float(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), defer_bn=flag)
        model.to(memory_format=torch.channels_last)
        step = fastconv.TrainStep(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), 0.1))
        x = image(2, 4, 6, 5).float().contiguous(memory_format=torch.channels_last)
        losses.append([float(step(x, torch.tensor([0, 2]))) for _ in range(3)])
        assert ("defer_bn" in step.plan_reason) == flag
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
