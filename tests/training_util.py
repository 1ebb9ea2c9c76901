"""What the tests of the training program's parts share; bench/ is on the path of those who import this."""

from __future__ import annotations

from pathlib import Path

from training.settings import parse


def settings(tmp_path: Path, *arguments: str):
    return parse(["--report", str(tmp_path), "--device", "cpu", *arguments])
