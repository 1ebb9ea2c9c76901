"""bench/train_cifar10.py as its users start it: in a process of its own, killed, interrupted, resumed, misused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PROGRAM = [sys.executable, str(ROOT / "bench" / "train_cifar10.py")]
SMALL = ["--model", "resnet18", "--dataset", "synthetic", "--batch-size", "4", "--no-download"]
# dropout masks, crops and momentum: a resumed run must have all of them right to get the same losses
RANDOM = [*SMALL, "--max-steps", "12", "--log-every", "2", "--dropout", "0.3", "--augment", "--momentum", "0.8"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that wait for each other on a busy machine would make minutes of seconds."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def run(*arguments: object, program: list[str] = PROGRAM) -> subprocess.CompletedProcess[str]:
    """Waits for the end; a run that hangs fails the test, and its workers end with it."""
    process = subprocess.Popen(
        [*program, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def run_until(line_start: str, send: signal.Signals, *arguments: object) -> tuple[int, str]:
    """Starts the program and sends it a signal at the first line that starts so. Returns exit code and all output."""
    process = subprocess.Popen(
        [*PROGRAM, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A suite that a shell has put in the background ignores SIGINT, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    shown = []
    for line in process.stdout:
        shown.append(line)
        if line.startswith(line_start):
            process.send_signal(send)
            break
    rest = process.communicate(timeout=120)[0]
    return process.returncode, "".join(shown) + rest


def facts(report: Path) -> dict:
    return json.loads((report / "report.json").read_text())


def test_a_comparison_makes_a_whole_report(tmp_path: Path) -> None:
    done = run("--backend", "compare", *SMALL, "--max-steps", 12, "--log-every", 4, "--report", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stdout + done.stderr  # plain lines where there is no terminal
    line = r"\[1,     4\] loss: \d\.\d{3} stock  \d\.\d{3} fastconv \| [\d,]+ / [\d,]+ images/s \| \d+:\d\d left"
    assert re.search(line, done.stdout)
    assert str(tmp_path / "report.md") in done.stdout

    report = facts(tmp_path)
    assert {"date", "command", "settings", "device", "versions", "git", "seconds", "notes"} <= report.keys()
    assert report["steps"] == 12 and report["dataset"]["name"] == "synthetic" and report["device"]["name"]
    assert report["versions"]["torch"] == torch.__version__ and report["versions"]["fastconv"]
    assert report["backends"].keys() == {"stock", "fastconv"}
    for backend in report["backends"].values():
        times = backend["ms_per_step"]
        assert 0 < times["p20"] <= times["median"] <= times["p80"] and times["steps"] == 9  # 3 are the warm-up
        assert times["images_per_second"] == pytest.approx(4000 / times["median"])
        assert len(backend["losses"]) == 12 and backend["final_loss"] == backend["losses"][-1]
        assert 0 <= backend["accuracy"] <= 1 and backend["setup_seconds"] > 0 and backend["first_step_seconds"] > 0
        assert backend["saved_for_backward_bytes"] > 100_000
    stock, fastconv = (report["backends"][name]["losses"] for name in ("stock", "fastconv"))
    assert stock[0] == pytest.approx(fastconv[0], rel=1e-4)  # the same weights, the same batch
    compared = report["comparison"]
    assert compared["low"] <= compared["ratio"] <= compared["high"] and compared["pairs"] == 9
    assert compared["winner"] in ("stock", "fastconv", None)

    text = (tmp_path / "report.md").read_text()
    assert compared["verdict"] in text and compared["accuracy"] in text and compared["verdict"] in done.stdout
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert text.count("![") == 2 and "conv+bn" in text
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 12


@pytest.mark.parametrize("trained", ["stock", "compare"])
def test_a_killed_run_resumes_to_bitwise_the_same_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: str
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2" if trained == "stock" else "1")
    arguments = ["--backend", trained, *RANDOM, "--report"]
    assert run(*arguments, tmp_path / "whole").returncode == 0
    killed = tmp_path / "killed"
    code, _ = run_until("[1,     4]", signal.SIGKILL, *arguments, killed, "--checkpoint-every", 1)
    assert code == -signal.SIGKILL and not (killed / "report.json").exists()
    done = run(*arguments, killed, "--resume", "--checkpoint-every", 5)
    assert done.returncode == 0, done.stderr
    resumed = re.search(rf"^resuming from {killed}/checkpoint.pt at epoch 1 step (\d+)$", done.stdout, re.MULTILINE)
    assert resumed and 3 <= int(resumed[1]) < 12  # at most the step under way was lost

    for name, expected in facts(tmp_path / "whole")["backends"].items():
        assert facts(killed)["backends"][name]["losses"] == expected["losses"]
        assert facts(killed)["backends"][name]["accuracy"] == expected["accuracy"]
    ends = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (tmp_path / "whole", killed)]
    for name in ends[0]["trainees"]:
        ours, theirs = (end["trainees"][name]["model"] for end in ends)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_ctrl_c_saves_and_leaves_with_a_plain_message(tmp_path: Path) -> None:
    arguments = ["--backend", "stock", *SMALL, "--log-every", "2", "--report", tmp_path]
    code, output = run_until("[1,     4]", signal.SIGINT, *arguments, "--max-steps", 500)
    assert code == 130
    assert "Traceback" not in output
    stopped = re.search(r"stopped: stopped by SIGINT after step (\d+) of 500; go on with --resume from (.*)", output)
    assert stopped and stopped[2] == str(tmp_path / "checkpoint.pt")
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == int(stopped[1])

    done = run(*arguments, "--max-steps", int(stopped[1]) + 2, "--resume")  # another end is no other run
    assert done.returncode == 0, done.stderr
    assert f"at epoch 1 step {stopped[1]}" in done.stdout
    assert facts(tmp_path)["steps"] == int(stopped[1]) + 2

    other = run(*arguments, "--max-steps", 500, "--resume", "--lr", 0.5, "--seed", 3)
    assert other.returncode == 1 and "Traceback" not in other.stderr
    assert "--lr was 0.01, now 0.5; --seed was 0, now 3" in other.stderr


def test_ctrl_c_before_the_first_step(tmp_path: Path) -> None:
    code, output = run_until("data:", signal.SIGINT, *SMALL, "--max-steps", 500, "--report", tmp_path)
    assert code == 130 and "Traceback" not in output
    assert "stopped by SIGINT" in output


def test_a_corrupt_archive_ends_the_program(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"half a download")
    for dataset in ("cifar10", "auto"):
        done = run("--dataset", dataset, "--data", tmp_path, "--report", tmp_path / "out")
        assert done.returncode == 1
        assert "cifar-10-python.tar.gz is corrupt or partial" in done.stderr and "Traceback" not in done.stderr
        assert not any((tmp_path / "out").iterdir())


def test_a_loss_that_is_not_finite_ends_the_program_and_keeps_the_good_checkpoint(tmp_path: Path) -> None:
    """At this rate the weights survive the first step, and the second step's loss is NaN."""
    arguments = ["--backend", "stock", *SMALL, "--max-steps", 9, "--report", tmp_path]
    done = run(*arguments, "--lr", "1e25", "--checkpoint-every", 1)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    message = r"error: the loss of stock is nan at epoch 1 step (\d) \(step \d of 9\), learning rate 1e\+25; "
    found = re.search(message + rf"the last good checkpoint is {tmp_path}/checkpoint.pt, after step (\d)", done.stderr)
    assert found, done.stderr
    assert int(found[1]) == int(found[2]) + 1
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == int(found[2])
    assert all(value.isfinite().all() for value in state["trainees"]["stock"]["model"].values())


def test_two_processes_of_torchrun_train_one_model(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", PROGRAM[1]]
    half = [*SMALL[:4], "--batch-size", 2, "--backend", "compare", "--max-steps", 4, "--report", tmp_path]
    done = run(*half, "--checkpoint-every", 2, program=torchrun)
    assert done.returncode == 0, done.stderr
    report = facts(tmp_path)
    assert report["settings"]["processes"] == 2
    for backend in report["backends"].values():
        assert len(backend["losses"]) == 4
        assert backend["ms_per_step"]["images_per_second"] == pytest.approx(4000 / backend["ms_per_step"]["median"])
    random = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["trainees"]["stock"]["random"]
    assert len(random) == 2 and not torch.equal(random[0][0], random[1][0])
    assert done.stdout.count("report:") == 1  # one process speaks


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--batch-size", "0"], 2, "argument --batch-size: must be at least 1, got 0"),
        (["--model", "alexnet", *SMALL[2:]], 2, "alexnet cannot train on batches of 4 images of 32x32 pixels"),
        (["--resume"], 1, "--resume: there is no checkpoint at"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(tmp_path: Path, arguments: list, code: int, message: str) -> None:
    done = run(*SMALL, *arguments, "--report", tmp_path / "out")
    assert done.returncode == code
    assert message in done.stderr and "Traceback" not in done.stderr
