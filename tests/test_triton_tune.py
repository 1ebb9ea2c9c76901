"""Tiles by measurement: every candidate checked for equality, wrong ones left out, the fastest kept and found again."""

from __future__ import annotations

import threading

import pytest
import torch
from test_triton_tolerance import DEVICE, image, require_triton

import fastconv
import fastconv.functional as FF
from fastconv.ops import choice

require_triton()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTCONV_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FASTCONV_TUNE", raising=False)
    choice.forget()
    yield
    choice.forget()


@pytest.fixture
def triton_or_aten(monkeypatch):
    """These are a call's only backends, in the interpreter on CPU tensors too."""
    monkeypatch.setitem(choice.registry._PREFERENCE, DEVICE, ("triton",))


def tuned_directions(device=DEVICE):
    keys = choice.store_of(torch.empty(0, device=device).device)._entries
    return sorted(key.split()[1] for key in keys if key.startswith("tile"))


def pointwise(grad=True):
    x, w = image(2, 16, 4, 4, torch.float32), image(8, 16, 1, 1, torch.float32, 1)
    return x.requires_grad_(grad), w.requires_grad_(grad)


def problem(dtype=torch.float32, n=3, c=16, k=24, size=4, taps=3):
    from fastconv.triton import conv2d

    x = image(n, c, size, size, dtype)
    return x, conv2d.problem_of(x.shape, (k, c, taps, taps), (1, 1), (taps // 2,) * 2, (1, 1), 1, dtype)


@pytest.mark.parametrize(
    ("dtype", "taps", "tf32"), [(torch.float32, 3, False), (torch.float32, 3, True), (torch.float16, 1, False)]
)
@pytest.mark.parametrize("op", ["fprop", "dgrad", "wgrad"])
def test_every_candidate_is_right_and_timed(op, dtype, taps, tf32, monkeypatch):
    from fastconv.triton import conv_config, conv_tune

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    x, a = problem(dtype, taps=taps)
    found = conv_config.candidates(op, a, *conv_config.device_limits(x.device.index))
    assert conv_config.choose(op, a, x) == found[0], "without a measurement the cost model's first"
    assert a.exact == (dtype is torch.float32 and not tf32)
    best = conv_tune.tune(op, a, x)
    entry = choice.store_of(x.device).get(conv_tune.class_of(op, a, dtype))
    assert set(entry["ms"]) == {conv_tune.name_of(t) for t in found} and "failed" not in entry
    assert conv_tune.name_of(best) == min(entry["ms"], key=lambda name: entry["ms"][name])
    choice.forget()  # as a new process
    assert conv_config.choose(op, a, x) == best
    torch.use_deterministic_algorithms(True)
    try:
        assert conv_config.choose(op, a, x) == found[0]
    finally:
        torch.use_deterministic_algorithms(False)


def test_tiles_that_are_wrong_or_do_not_run_are_left_out(monkeypatch, caplog):
    """One wrong element, one never written, and a launch that fails."""
    from fastconv.triton import conv2d, conv_config, conv_tune

    x, a = problem()
    found = conv_config.candidates("fprop", a, *conv_config.device_limits(x.device.index))
    assert len(found) >= 4
    real = conv2d.fprop

    def fprop(x, w, y, a, tile, **epilogue):
        if tile == found[2]:
            raise RuntimeError("out of resources: shared memory")
        real(x, w, y, a, tile, **epilogue)
        if tile == found[0]:
            y[0, 0, 0, 0] += 40.0
        if tile == found[1]:
            y[0, 0, 0, 0] = torch.nan

    monkeypatch.setattr(conv2d, "fprop", fprop)
    best = conv_tune.tune("fprop", a, x)
    assert best not in found[:3]
    failed = choice.store_of(x.device).get(conv_tune.class_of("fprop", a, torch.float32))["failed"]
    names = [conv_tune.name_of(t) for t in found[:3]]
    assert set(failed) == set(names) and "wrong numbers" in failed[names[0]] and "wrong numbers" in failed[names[1]]
    assert "out of resources" in failed[names[2]]
    assert len([r for r in caplog.records if "is left out" in r.getMessage()]) == 3
    monkeypatch.setattr(conv2d, "fprop", lambda x, w, y, a, tile: y.fill_(0))
    with pytest.raises(RuntimeError, match="no tile gives right numbers"):
        conv_tune.tune("fprop", a, x)


@pytest.mark.usefixtures("triton_or_aten")
@pytest.mark.parametrize("wish", ["0", "1"])
def test_a_tuning_run_measures_the_tiles_of_its_calls(wish, monkeypatch):
    """All three directions of a call with gradients; an ordinary call measures none, nor hides the call from the run
    where it was measured at its first use."""
    x, w = pointwise()
    monkeypatch.setenv("FASTCONV_TUNE", wish)
    FF.conv2d_bias_act(x, w).sum().backward()
    assert len(choice.store_of(x.device)) == int(wish) and not tuned_directions()
    monkeypatch.delenv("FASTCONV_TUNE")
    with fastconv.tune.measuring(seconds=0.0) as tuning:
        FF.conv2d_bias_act(x, w)
    (result,) = tuning.results.values()
    assert set(result.ms) == {"triton", "aten"} and not result.failed
    assert tuned_directions() == ["dgrad", "fprop", "wgrad"]
    with fastconv.tune.measuring(seconds=0.0) as tuning:
        FF.conv2d_bias_act(x, w)
    assert not tuning.results


@pytest.mark.usefixtures("triton_or_aten")
def test_tuning_a_model_finds_what_its_first_use_left_undone(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Conv2d(16, 8, 1), torch.nn.ReLU(), torch.nn.Flatten())
    model = fastconv.fuse(model).eval().to(DEVICE)
    x, totals = image(2, 16, 2, 2, torch.float32), []
    monkeypatch.setenv("FASTCONV_TUNE", "1")
    with torch.no_grad():
        model(x)
    for expected in (1, 0):
        fastconv.tune.tune(model, x, 4, modes=("inference",), seconds=0.0, progress=totals.append)
        assert totals.pop() == expected and tuned_directions() == ["fprop"]


@pytest.mark.usefixtures("triton_or_aten")
def test_tiles_of_a_backward_that_may_have_its_own_thread(monkeypatch):
    """As CUDA's has, unless the engine is told otherwise: the wish to tune is this thread's alone."""
    real = torch.autograd.grad

    def grad(*args, **how):
        if not torch._C._is_multithreading_enabled():
            return real(*args, **how)
        found = []
        thread = threading.Thread(target=lambda: found.extend(real(*args, **how)))
        thread.start()
        thread.join()
        return tuple(found)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    with fastconv.tune.measuring(seconds=0.0):
        FF.conv2d_bias_act(*pointwise())
    assert tuned_directions() == ["dgrad", "fprop", "wgrad"] and torch._C._is_multithreading_enabled()


@pytest.mark.usefixtures("triton_or_aten")
def test_tuning_in_inference_mode():
    with torch.inference_mode(), fastconv.tune.measuring(seconds=0.0) as tuning:
        FF.conv2d_bias_act(*pointwise(grad=False))
    (result,) = tuning.results.values()
    assert set(result.ms) == {"triton", "aten"} and not result.failed and tuned_directions() == ["fprop"]


def test_a_tuning_run_looks_for_a_tile_once(monkeypatch):
    """Later calls pay a dict's price: their times are compared with those of other backends."""
    from fastconv.triton import conv_config, conv_tune

    x, a = problem()
    asked = []
    monkeypatch.setattr(conv_tune, "tune", lambda op, a, like: conv_config.candidates(op, a)[1])
    monkeypatch.setattr(conv_tune, "stored", lambda *args: asked.append(args))
    first = conv_config.choose("fprop", a, x)
    for _ in range(2):  # two runs
        choice.set_policy(None)
        assert conv_config.choose("fprop", a, x) == first
        with conv_config.tuning(True):
            assert {conv_config.choose("fprop", a, x) for _ in range(3)} == {conv_config.candidates("fprop", a)[1]}
    assert conv_config.choose("fprop", a, x) != first and len(asked) == 5


def test_the_queue_is_full_before_a_tile_is_timed(monkeypatch):
    """Else a small kernel's time is that of its launch on the host."""
    from fastconv.triton import conv_tune

    done = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            done.append("record")

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 1.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("sleep"))
    trial = object.__new__(conv_tune._Trial)
    trial.device, trial.run = torch.device("cuda"), lambda tile: done.append("run")
    assert trial.milliseconds(None) == 1.0 / conv_tune._REPEATS
    assert done == ["sleep", "record", *["run"] * conv_tune._REPEATS, "record"] * conv_tune._ROUNDS


def test_a_tile_measured_at_another_batch_keeps_its_own_splits(monkeypatch):
    from fastconv.triton import conv_config, conv_tune

    monkeypatch.setattr(conv_tune, "device_limits", lambda index: (132, 227 * 1024))
    x, a = problem(n=128, c=64, k=64)
    _, b = problem(n=65, c=64, k=64)
    at_128 = {conv_tune.name_of(t): t for t in conv_config.candidates("wgrad", a)}
    key = conv_tune.class_of("wgrad", a, x.dtype)
    tried = 0
    for tile in conv_config.candidates("wgrad", b):
        twin = at_128.get(conv_tune.name_of(tile), tile)
        if tile.splits != twin.splits:
            times = {name: [1.0 if name == conv_tune.name_of(tile) else 2.0] for name in at_128}
            choice.store_of(x.device).put(key, {"ms": times}, replace=True)
            assert conv_tune.stored("wgrad", a, x) == twin and conv_tune.stored("wgrad", b, x) == tile
            tried += 1
    assert tried > 2


def test_the_batch_is_rounded_and_foreign_tiles_do_not_count():
    from fastconv.triton import conv_config, conv_tune

    x, a = problem(n=3)
    _, b = problem(n=4)
    assert conv_tune.class_of("wgrad", a, x.dtype) == conv_tune.class_of("wgrad", b, x.dtype)
    key = conv_tune.class_of("fprop", a, x.dtype)
    choice.store_of(x.device).put(key, {"ms": {"999x999x999 s9": [0.001]}})
    found = conv_config.candidates("fprop", a, *conv_config.device_limits(x.device.index))
    assert conv_config.choose("fprop", a, x) == found[0]
