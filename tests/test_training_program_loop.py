"""The training program's statistics, its loop in this process, and its report."""

from __future__ import annotations

import math
import re
import signal
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import train_cifar10  # noqa: E402
from training import compare, data, models, report  # noqa: E402
from training.trainee import Block, RandomStream, Trainee  # noqa: E402
from training_util import settings  # noqa: E402

ALONE = SimpleNamespace(rank=0, count=1, gather=lambda value: [value])


@pytest.fixture
def main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """The program in this process on a small data set: main(*arguments) -> exit code, its report in `tmp_path`."""
    torch.set_num_threads(1)  # two would wait for each other on a busy machine
    monkeypatch.setattr(data, "_synthetic", lambda make=data._synthetic: make(train=64, test=32))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    flags = cuda.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    base = [
        "--model",
        "resnet18",
        "--dataset",
        "synthetic",
        "--batch-size",
        "4",
        "--max-steps",
        "3",
        "--backend",
        "stock",
    ]
    yield lambda *arguments: train_cifar10.main([*base, "--report", str(tmp_path), *map(str, arguments)])
    cuda.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = flags
    for number, handler in handlers.items():
        signal.signal(number, handler)


# ----------------------------------------------------------------------------------------------- statistics


def blocks(*milliseconds: float) -> list[Block]:
    return [Block(step, 1, value / 1000, warm=step >= 2) for step, value in enumerate(milliseconds)]


def verdict(stock: list[Block], fastconv: list[Block]) -> tuple[str | None, str]:
    result = compare.Comparison.of(stock, fastconv)
    return result.winner, result.verdict(compare.Timing.of(stock, 8), compare.Timing.of(fastconv, 8))


def test_the_verdict_names_the_winner_whoever_it_is() -> None:
    slow, fast = blocks(900, 900, *[30 + i % 3 for i in range(20)]), blocks(900, 5, *[20 + i % 3 for i in range(20)])
    winner, words = verdict(slow, fast)
    assert winner == "fastconv" and words.startswith("fastconv is faster: 1.48 times the speed of stock PyTorch")
    winner, words = verdict(fast, slow)
    assert winner == "stock" and words.startswith("Stock PyTorch is faster: 1.48 times the speed of fastconv")
    assert "21 ms with stock" in words and "31 ms with fastconv" in words


def test_noise_is_no_victory() -> None:
    even = blocks(1, 1, *[20 + 5 * (i % 2) for i in range(20)])
    odd = blocks(1, 1, *[25 - 5 * (i % 2) for i in range(20)])
    assert verdict(even, odd)[0] is None and "within the noise" in verdict(even, odd)[1]
    certain_but_tiny = blocks(1, 1, *[20.1] * 20)
    assert verdict(certain_but_tiny, blocks(1, 1, *[20.0] * 20))[0] is None
    assert "Too few steps were timed (3)" in verdict(blocks(1, 1, 9, 9, 9), blocks(1, 1, 1, 1, 1))[1]


def test_the_median_interval_is_the_sign_tests() -> None:
    """Order statistics of the 95% interval, as tabled for the sign test: n -> (lower, upper), counted from 1."""
    for count, (low, high) in {6: (1, 6), 10: (2, 9), 20: (6, 15), 30: (10, 21), 100: (40, 61)}.items():
        assert compare.median_interval([float(value) for value in range(1, count + 1)]) == (low, high)


def test_the_median_interval_covers_the_median_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(1000):
        low, high = compare.median_interval(torch.randn(25, generator=generator).tolist())
        covered += low <= 0 <= high
    assert covered >= 940


def test_quantiles_are_numpys() -> None:
    values = torch.randn(17).double()
    for share in (0.0, 0.2, 0.5, 0.8, 1.0):
        assert compare.quantile(values.tolist(), share) == pytest.approx(values.quantile(share).item())
    assert compare.quantile(values.tolist(), 0.5) == statistics.median(values.tolist())


def test_accuracies_are_the_same_or_not() -> None:
    assert "equally well" in compare.accuracy_words(0.90, 0.91, 360)
    assert "fastconv is better" in compare.accuracy_words(0.80, 0.91, 10_000)


# -------------------------------------------------------------------------------------------------- the loop


@pytest.mark.parametrize(
    "arguments",
    [
        ["--optimizer", "adam", "--loss", "mse", "--loader", "torch"],
        ["--optimizer", "adagrad", "--loss", "kl", "--label-smoothing", 0.1, "--weight-decay", 1e-4],
        ["--precision", "bf16", "--activation", "silu", "--backend", "fastconv", "--tensorboard"],
        ["--precision", "fp16", "--backend", "compare", "--loss", "kl"],
        ["--stem", "cifar", "--freeze-backbone", "--dropout", 0.1, "--augment", "--image-size", 16],
    ],
    ids=lambda arguments: " ".join(map(str, arguments)),
)
def test_every_option_trains(main, tmp_path: Path, arguments: list) -> None:
    assert main(*arguments) == 0
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 3
    assert all(math.isfinite(loss) for trainee in state["trainees"].values() for loss in trainee["losses"].tolist())
    assert (tmp_path / "report.md").exists()
    assert any((tmp_path / "tensorboard").glob("events*")) == ("--tensorboard" in arguments)
    assert main(*arguments, "--resume", "--max-steps", 4) == 0  # optimizer and scaler states load again
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 4


def test_the_original_log(main, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """As PyTorch's CIFAR-10 tutorial prints: place of the mini-batch in the epoch, mean loss since the last line."""
    weights = tmp_path / "weights.pt"  # so that the recipe looks for none on the network
    torch.save(torchvision.models.resnet18().state_dict(), weights)
    assert main("--recipe", "origin", "--log-every", 2, "--max-steps", 20, "--weights", weights) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [line for line in lines if line.startswith("[")]
    places = [(1, step) for step in range(2, 17, 2)] + [(2, 2), (2, 4)]  # 64 images: 16 steps to an epoch
    assert [re.fullmatch(r"\[(\d+), ( *\d+)\] loss: \d+\.\d{3}", line) is not None for line in shown] == [True] * 10
    assert [line.split("]")[0] for line in shown] == [f"[{epoch}, {step:5d}" for epoch, step in places]
    assert any(re.fullmatch(r"Accuracy of the network on the 32 test images: \d+\.\d\d %", line) for line in lines)


def test_weights_that_are_not_finite_are_never_saved(main, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main("--max-steps", 1) == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    assert main("--lr", 1e38, "--max-steps", 1) == 1  # the loss of this step is finite, its update is not
    error = capsys.readouterr().err
    assert "is no longer finite after the update at epoch 1 step 1" in error
    assert "there is no checkpoint of this run yet" in error
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_measuring_kept_bytes_changes_nothing(tmp_path: Path) -> None:
    args = settings(tmp_path, "--model", "resnet18", "--dropout", "0.5")
    model, _ = models.build_model(args, 10, print)
    trainee = Trainee("stock", model, args, ALONE)
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    kept = trainee.saved_bytes(images, labels)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    # at least each convolution's input and each BatchNorm's input: 20 of each, all listed by hooks
    sizes = []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            module.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].nbytes))
    model(images)
    assert len(sizes) == 40 and max(sizes) < kept < 1.5 * sum(sizes)


def test_random_streams_do_not_disturb_each_other() -> None:
    outside = torch.get_rng_state()
    streams = [RandomStream(7, torch.device("cpu")) for _ in range(2)]
    drawn: list[list[torch.Tensor]] = [[], []]
    for turn in (0, 1, 1, 0, 0, 1):
        with streams[turn]:
            drawn[turn].append(torch.rand(3))
    assert torch.equal(torch.stack(drawn[0]), torch.stack(drawn[1]))
    assert len(torch.stack(drawn[0]).unique()) == 9
    assert torch.equal(outside, torch.get_rng_state())


def test_the_report_says_in_words_what_its_numbers_say() -> None:
    timing = {"median": 10.0, "p20": 9.0, "p80": 30.0, "steps": 9, "images_per_second": 800.0}
    stock = {
        "ms_per_step": timing,
        "accuracy": 0.5,
        "final_loss": 1.0,
        "setup_seconds": 1.0,
        "first_step_seconds": None,
    }
    stock |= {"peak_gpu_bytes": None, "saved_for_backward_bytes": 2**20, "fusion_report": None}
    facts = {
        "recipe": None,
        "command": "python bench/train_cifar10.py --dataset auto",
        "settings": {**dict.fromkeys(("activation", "dropout", "weight_decay", "label_smoothing", "freeze_backbone"))}
        | {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "loss": "kl", "batch_size": 8, "processes": 1, "seed": 0}
        | {"precision": "fp32", "augment": False, "image_size": 32},
        "dataset": {"name": "digits", "asked_for": "auto", "origin": "digits, taken by --dataset auto because offline"}
        | {"train_images": 1437, "test_images": 360},
        "model": {"name": "resnet18", "stem": "imagenet", "parameters": 11_000_000, "weights": "random"}
        | {"trained_parameters": 11_000_000},
        "device": {"type": "cpu", "name": "a processor", "detail": "2 threads"},
        "versions": {"torch": "2.11"},
        "git": {"commit": "abc", "dirty": True},
        "date": "2026-01-01",
        "seconds": 10,
        "steps": 12,
        "notes": ["something was unusual"],
        "peak_rss_bytes": 2**30,
        "fastconv_backends": None,
        "backends": {"stock": stock},
    }
    text = report.markdown(facts)
    for part in (
        "stock trains 800 images per second (10 ms per step) and then classifies 50.00% of the 360 test images",
        "digits, taken by --dataset auto because offline",
        "The times spread widely (p80 is 3.3 times p20)",
        "abc with uncommitted changes",
        "- something was unusual",
        "| kept for the backward pass | 1 MiB |",
    ):
        assert part in text
    assert "peak GPU memory" not in text


def test_batches_made_inside_the_step_train_the_same(main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As fastconv does on a GPU, where the step's CUDA graph makes them."""
    weights, asked = [], []

    def inside(name: str, args, ranks) -> bool:
        asked.append(name)
        return len(weights) == 1

    monkeypatch.setattr("training.trainee.prepares", inside)
    for _ in range(2):
        assert main("--max-steps", 3, "--augment", "--backend", "fastconv") == 0
        saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["trainees"]["fastconv"]
        weights.append({**saved["model"], "losses": saved["losses"]})
        (tmp_path / "checkpoint.pt").unlink()
    assert asked == ["fastconv"] * 2
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
