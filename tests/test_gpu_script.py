"""bench/gpu.sh without a GPU: its budget, its table, what it does with parts that fail or take too long."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "bench" / "gpu.sh"
pytestmark = pytest.mark.skipif(
    shutil.which("bash") is None or shutil.which("timeout") is None or not SCRIPT.exists(),
    reason="needs bash, coreutils' timeout and the source tree",
)


def run(*arguments, python="/bin/true"):
    """(exit status, the table's lines, all of stdout) with another program as the Python interpreter."""
    done = subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(python)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.fixture
def slow(tmp_path):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho begun\nsleep 30\n")
    program.chmod(0o755)
    return program


def test_the_default_parts_fit_in_ten_minutes():
    text = SCRIPT.read_text()
    limits = {name: int(value) for name, value in re.findall(r"\[(\w+)\]=(\d+)", text)}
    default = re.search(r"^DEFAULT=\((.*)\)$", text, re.M)[1].split()
    assert sum(limits[part] for part in default) < 600
    assert set(limits) == set(re.findall(r"^part_(\w+)\(\)", text, re.M))
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


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
    program = tmp_path / "python"
    program.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        "*test_nn.py*) echo '1 failed, 2 passed, 4 skipped in 1.00s'; exit 1;;\n"
        "*test_data.py*) echo '9 deselected in 0.10s'; exit 5;;\n"
        "*) echo '=== 3 passed, 1 skipped in 62.00s (0:01:02) ===';;\n"
        "esac\n"
    )
    program.chmod(0o755)
    status, lines, _ = run(tmp_path / "out", "test", python=program)
    log = (tmp_path / "out" / "test.log").read_text().splitlines()
    files = int(re.search(r"(\d+) files$", log[-1])[1])
    assert log[-1] == f"1 failed, 0 error, {2 + 3 * (files - 2)} passed, {4 + files - 2} skipped, {files} files"
    assert status == 1 and lines[0].split()[:2] == ["test", "FAILED"] and lines[0].endswith(log[-1][-20:])
    assert not any("test_triton_compile" in line for line in log)


def test_unknown_parts_and_no_arguments(tmp_path):
    status, lines, errors = run(tmp_path / "out", "tun")
    assert status == 2 and not lines and "no part named tun (info build" in errors
    status, _, errors = run()
    assert status == 2 and "bench/gpu.sh [--seconds N] OUTDIR [PART...]" in errors
