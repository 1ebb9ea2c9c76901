"""The training program's checkpoints: whole or absent, never trusted blindly."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

from training import checkpoint  # noqa: E402
from training.errors import CheckpointError, ProgramError  # noqa: E402
from training.models import build_model  # noqa: E402
from training.settings import parse  # noqa: E402

WHOLE = {**dict.fromkeys(checkpoint.KEYS, 0), "format": checkpoint.FORMAT, "weights": torch.arange(5.0)}


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, WHOLE)
    before = path.read_bytes()

    def fill_the_disk(file) -> None:
        file.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoint.write_atomically(path, fill_the_disk)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_the_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        calls.append("fsync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def record_replace(source, target) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    checkpoint.save(tmp_path / "checkpoint.pt", WHOLE)
    assert calls == ["fsync checkpoint.pt.tmp", "rename", f"fsync {tmp_path.name}"]


def test_a_folder_that_cannot_be_written_is_a_plain_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="could not be written"):
        checkpoint.save(tmp_path / "no such folder" / "checkpoint.pt", WHOLE)


KILLS = """
import sys; sys.path.insert(0, sys.argv[1])
import itertools, os, signal, time, torch
from pathlib import Path
from training import checkpoint
path = Path(sys.argv[2])
state = {**dict.fromkeys(checkpoint.KEYS, 0), "format": checkpoint.FORMAT}
torch.set_num_threads(1)  # a forked child cannot use its parent's OpenMP threads
midway = 0
for attempt in range(25):
    child = os.fork()
    if child == 0:
        for number in itertools.count():
            checkpoint.save(path, {**state, "weights": torch.full((200_000,), 1000.0 * attempt + number)})
    while attempt == 0 and not path.exists():
        time.sleep(0.001)
    time.sleep(0.01 + 0.0017 * attempt)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    midway += path.with_name(path.name + ".tmp").exists()
    weights = checkpoint.load(path)["weights"]
    assert (weights == weights[0]).all()
print(midway, "of 25 killed while writing")
"""


def test_sigkill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    program = [sys.executable, "-c", KILLS, str(BENCH), str(tmp_path / "checkpoint.pt")]
    run = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[0]) > 0, "no kill fell into a write: the test saw nothing"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged or none at all"),
        (b"not a checkpoint", "is damaged or none at all"),
        ("cut short", "is damaged or none at all"),
        ({"weights": 1}, "is no checkpoint of this program"),
        ([1, 2], "is no checkpoint of this program"),
        ({**WHOLE, "format": 99}, "has checkpoint format 99, this program reads format 1"),
    ],
)
def test_what_is_no_whole_checkpoint_is_refused(tmp_path: Path, content, message: str) -> None:
    path = tmp_path / "checkpoint.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "cut short":
        torch.save({**WHOLE, "weights": torch.randn(10_000)}, path)
        path.write_bytes(path.read_bytes()[:-2000])
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(path)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb",)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({**WHOLE, "weights": Bomb()}, "checkpoint.pt")
    (tmp_path / "weights.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="damaged or none at all"):
        checkpoint.load(tmp_path / "checkpoint.pt")
    with pytest.raises(ProgramError, match="cannot be read as a state_dict"):
        build_model(parse(["--model", "resnet18", "--weights", "weights.pt", "--report", "out"]), 10, print)
    assert not (tmp_path / "bomb").exists()


def test_every_argument_that_matters_is_named_when_it_differs(tmp_path: Path) -> None:
    dataset = SimpleNamespace(name="digits", fingerprint=lambda: "12345678")
    ranks = SimpleNamespace(count=1)
    args = parse(["--report", str(tmp_path)])
    state = {"settings": checkpoint.binding_settings(args, "digits"), "ranks": 1, "data": "12345678"}
    checkpoint.check_fits(Path("c.pt"), state, args, dataset, ranks)

    other = parse(
        ["--report", str(tmp_path), "--lr", "0.5", "--batch-size", "8", "--max-steps", "7", "--log-every", "3"]
    )
    with pytest.raises(CheckpointError) as error:
        checkpoint.check_fits(Path("c.pt"), state, other, dataset, ranks)
    assert "--lr was 0.01, now 0.5" in str(error.value) and "--batch-size was 64, now 8" in str(error.value)
    assert "max-steps" not in str(error.value) and "log-every" not in str(error.value)

    with pytest.raises(CheckpointError, match="processes were 1, now 2"):
        checkpoint.check_fits(Path("c.pt"), state, args, dataset, SimpleNamespace(count=2))
    with pytest.raises(CheckpointError, match="images of digits are not the same"):
        checkpoint.check_fits(Path("c.pt"), {**state, "data": "other"}, args, dataset, ranks)
    with pytest.raises(CheckpointError, match="--dataset was digits, now cifar10"):
        cifar = SimpleNamespace(name="cifar10", fingerprint=lambda: "12345678")
        checkpoint.check_fits(Path("c.pt"), state, args, cifar, ranks)
