"""Tiles by measurement: every candidate checked for equality, wrong ones left out, the fastest kept and found again."""

from __future__ import annotations

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


def test_a_tuning_run_measures_the_tiles_of_its_calls(monkeypatch):
    """All three directions of a call with gradients; an ordinary call measures none."""
    x = image(2, 16, 4, 4, torch.float32).requires_grad_()
    w = image(8, 16, 1, 1, torch.float32, 1).requires_grad_()
    order = choice.registry._PREFERENCE
    before = order[DEVICE]
    order[DEVICE] = ("triton",)
    try:
        # On a GPU it would be measured now, and the tuning run would find nothing left to do.
        monkeypatch.setenv("FASTCONV_TUNE", "0")
        FF.conv2d_bias_act(x, w).sum().backward()
        store = choice.store_of(x.device)
        assert not [key for key in store._entries if key.startswith("tile")]
        monkeypatch.delenv("FASTCONV_TUNE")
        with fastconv.tune.measuring(seconds=0.0) as tuning:
            FF.conv2d_bias_act(x, w)
        (result,) = tuning.results.values()
        assert set(result.ms) == {"triton", "aten"} and not result.failed
        tiles = [key.split()[1] for key in store._entries if key.startswith("tile")]
        assert sorted(tiles) == ["dgrad", "fprop", "wgrad"]
    finally:
        order[DEVICE] = before


def test_the_batch_is_rounded_and_foreign_tiles_do_not_count():
    from fastconv.triton import conv_config, conv_tune

    x, a = problem(n=3)
    _, b = problem(n=4)
    assert conv_tune.class_of("wgrad", a, x.dtype) == conv_tune.class_of("wgrad", b, x.dtype)
    key = conv_tune.class_of("fprop", a, x.dtype)
    choice.store_of(x.device).put(key, {"ms": {"999x999x999 s9": [0.001]}})
    found = conv_config.candidates("fprop", a, *conv_config.device_limits(x.device.index))
    assert conv_config.choose("fprop", a, x) == found[0]
