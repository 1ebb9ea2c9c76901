"""bench/gpu.sh without a GPU: its budget, its table, what it does with parts that fail or take too long."""

from __future__ import annotations

import inspect
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).parents[1] / "bench" / "gpu.sh"
pytestmark = pytest.mark.skipif(
    shutil.which("bash") is None or shutil.which("timeout") is None or not SCRIPT.exists(),
    reason="needs bash, coreutils' timeout and the source tree",
)


def run(*arguments, python="/bin/true", **more):
    """(exit status, the table's lines, all of stderr) with another program as the Python interpreter."""
    done = subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(python), **more}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stdout.splitlines(), done.stderr


def program(path, *lines):
    """A shell script at ``path``."""
    path.write_text("\n".join(("#!/bin/sh", *lines, "")))
    path.chmod(0o755)
    return path


@pytest.fixture
def slow(tmp_path):
    return program(tmp_path / "python", "echo begun", "sleep 30")


def test_the_default_parts_fit_in_ten_minutes():
    text = SCRIPT.read_text()
    limits = {name: int(value) for name, value in re.findall(r"\[(\w+)\]=(\d+)", text)}
    default, by_name = (re.search(rf"^{name}=\((.*)\)$", text, re.M)[1].split() for name in ("DEFAULT", "BY_NAME"))
    assert sum(limits[part] for part in default) < int(re.search(r"^seconds=(\d+)$", text, re.M)[1]) < 600
    assert set(limits) == set(re.findall(r"^part_(\w+)\(\)", text, re.M)) == {*default, *by_name}
    usage = re.sub(r"\s+", " ", text.partition("PART: ")[2].partition("Uses")[0])
    assert " ".join(default) + " (" in usage and " ".join(by_name) + " (" in usage
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_the_short_trainings_last_long_enough_for_a_verdict():
    """Blocks as the training program makes them on a GPU, those of the warm-up left out."""
    sys.path.insert(0, str(SCRIPT.parent))
    from training import compare, data, loop, settings

    images = inspect.signature(data._synthetic).parameters["train"].default
    every = settings.build_parser().get_default("checkpoint_every")
    args = SimpleNamespace(
        device=SimpleNamespace(type="cuda"), log_every=settings.DEFAULTS["log_every"], checkpoint_every=every
    )
    runs = re.findall(r'"(\d+) (\d+)"', re.search(r"^TRAIN=\((.*)\)$", SCRIPT.read_text(), re.M)[1])
    assert [int(batch) for batch, _ in runs] == [4, 128, 512]
    for batch, steps in runs:
        batches = SimpleNamespace(steps_per_epoch=images // int(batch))
        at, pairs = SimpleNamespace(step=0, total=int(steps), args=args, batches=batches), 0
        while at.step < at.total:
            pairs += at.step >= loop.WARMUP_STEPS["cuda"]
            at.step += loop.Loop._block_length(at)
        assert pairs >= compare.LEAST_PAIRS + 1, (batch, pairs)


def test_the_table_names_every_part_and_comes_last(tmp_path):
    status, lines, _ = run(tmp_path / "out", "tune", "train", "fragments")
    assert status == 1, "fragments: no compiler is named by /bin/true"
    assert [line.split()[:2] for line in lines] == [["tune", "ok"], ["train", "ok"], ["fragments", "FAILED"]]
    assert (tmp_path / "out" / "table.txt").read_text().splitlines() == lines
    assert (tmp_path / "out" / "fragments.log").exists()


def test_a_part_out_of_time_leaves_none_for_the_next(tmp_path, slow):
    began = time.monotonic()
    status, lines, _ = run("--seconds", 2, tmp_path / "out", "tune", "train", python=slow)
    assert time.monotonic() - began < 15 and status == 1
    assert lines[0].startswith("tune       out of time") and lines[0].endswith("begun")
    assert lines[1].startswith("train      no time")


def test_the_table_comes_when_the_run_is_ended(tmp_path, slow):
    process = subprocess.Popen(
        ["bash", str(SCRIPT), str(tmp_path / "out"), "tune", "train"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(slow)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    log = tmp_path / "out" / "tune.log"
    while not (log.exists() and "begun" in log.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=15)
    assert process.returncode == 1 and text.startswith("tune       interrupted")


def test_counts_of_the_files_are_added_up(tmp_path):
    """A run of pytest per file: their counts in one line, a file without tests of a GPU is no failure."""
    python = program(
        tmp_path / "python",
        'case "$*" in',
        "*test_nn.py*) echo '1 failed, 2 passed, 4 skipped in 1.00s'; exit 1;;",
        "*test_choice.py*) echo '9 deselected in 0.10s'; exit 5;;",
        "*) echo '=== 3 passed, 1 skipped in 62.00s (0:01:02) ===';;",
        "esac",
    )
    status, lines, _ = run(tmp_path / "out", "test", python=python)
    log = (tmp_path / "out" / "test.log").read_text().splitlines()
    files = int(re.search(r"(\d+) files$", log[-1])[1])
    assert files > 20 and any(line.startswith("tests/test_conv2d_bn_act.py: ") for line in log)
    assert log[-1] == f"1 failed, 0 error, {2 + 3 * (files - 2)} passed, {4 + files - 2} skipped, {files} files"
    assert status == 1 and lines[0].split()[:2] == ["test", "FAILED"] and lines[0].endswith(log[-1][-20:])
    assert not any("triton" in line for line in log)


def test_tests_out_of_time_are_counted_so_far(tmp_path):
    """Finished files by their summaries, the one that hangs by its lines; the test that hangs is named."""
    python = program(
        tmp_path / "python",
        'case "$*" in',
        "*test_nn.py*)",
        "  echo 'tests/test_nn.py::test_a[cuda] PASSED    [ 20%]'",
        "  echo 'tests/test_nn.py::test_b[cuda] SKIPPED (why)    [ 40%]'",
        "  echo 'tests/test_nn.py::test_c[cuda] FAILED    [ 60%]'",
        "  echo 'tests/test_nn.py::test_d[cuda] ERROR     [ 80%]'",
        "  printf 'tests/test_nn.py::test_e[cuda] '",
        "  sleep 30;;",
        "*test_choice.py*) echo 'no tests ran in 0.10s'; exit 5;;",
        "*) echo '=== 3 passed, 1 skipped in 62.00s (0:01:02) ===';;",
        "esac",
    )
    began = time.monotonic()
    status, lines, _ = run("--seconds", 4, tmp_path / "out", "test", python=python)
    assert time.monotonic() - began < 15 and status == 1
    log = (tmp_path / "out" / "test.log").read_text().splitlines()
    files = int(re.search(r"(\d+) files$", log[-1])[1])
    total = f"1 failed, 1 error, {1 + 3 * (files - 2)} passed, {1 + files - 2} skipped, {files - 1} of {files} files"
    assert log[-1] == total and lines[0].startswith("test       out of time") and lines[0].endswith(total)
    (cut,) = (line for line in log if "cut off" in line)
    assert "tests/test/test_nn.log" in cut and "test_e[cuda]" in cut


@pytest.mark.parametrize("hangs", (False, True))
def test_the_tools_of_the_sanitizer(tmp_path, hangs):
    """Two of them see PyTorch's blocks of memory as they are; on the GPU's tests alone; what passed is counted."""
    (tmp_path / "bin").mkdir()
    program(
        tmp_path / "bin" / "compute-sanitizer",
        'echo "cached: ${PYTORCH_NO_CUDA_MEMORY_CACHING-yes}; $*"',
        "echo 'tests/test_raw_ops.py::test_a[cuda] PASSED [ 50%]'",
        f'case "$*" in *synccheck*) sleep {30 if hangs else 0};; esac',
        "echo '=== 1 passed in 1.00s ==='",
        "echo '========= ERROR SUMMARY: 0 errors'",
    )
    path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    status, lines, _ = run("--seconds", 4, tmp_path / "out", "sanitize", PATH=path)
    assert status == hangs and lines[0].split()[1] == ("out" if hangs else "ok")
    assert lines[0].endswith("memcheck 1, racecheck 1, initcheck 1, synccheck 1 passed")
    logs = {path.stem[9:]: path.read_text() for path in (tmp_path / "out").glob("sanitize-*.log")}
    assert {tool for tool, log in logs.items() if log.startswith("cached: 1;")} == {"memcheck", "initcheck"}
    assert all("-k cuda and not simt tests/test_raw_ops.py" in log for log in logs.values())
    log = (tmp_path / "out" / "sanitize.log").read_text()
    assert all(f"{tool}: ERROR SUMMARY: 0 errors" in log for tool in ("memcheck", "racecheck", "initcheck"))


def test_backends_are_measured_only_where_that_was_asked_for(tmp_path):
    python = program(tmp_path / "python", "echo tune is ${FASTCONV_TUNE-unset}")
    for parts, more, tune in (
        (("plan",), {}, "0"), (("tune", "plan"), {}, "unset"), (("plan",), {"FASTCONV_TUNE": ""}, ""),
    ):  # fmt: skip
        _, lines, _ = run(tmp_path / "out", *parts, python=python, **more)
        assert lines[-1].rstrip().endswith(f"tune is {tune}".rstrip())


def test_time_left_over_goes_to_the_next_part(tmp_path):
    """Whose own limit would end it sooner; those after it keep theirs."""
    python = program(tmp_path / "python", 'case "$*" in *all.py*) echo "$*";; esac')
    for seconds, minutes in ((300, (300 - 70 - 5) / 60), (170, (100 - 5) / 60), (90, (90 - 5) / 60)):
        _, lines, _ = run("--seconds", seconds, tmp_path / "out", "ops", "train", python=python)
        log = (tmp_path / "out" / "ops.log").read_text()
        assert abs(float(log.rpartition("--minutes ")[2]) - minutes) < 0.05, log


def test_unknown_parts_and_no_arguments(tmp_path):
    status, lines, errors = run(tmp_path / "out", "tun")
    assert status == 2 and not lines and "no part named tun (info build" in errors
    status, _, errors = run()
    assert status == 2 and "bench/gpu.sh [--seconds N] OUTDIR [PART...]" in errors
