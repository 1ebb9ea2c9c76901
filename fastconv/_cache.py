"""Measured times on disk: one JSON file that any number of processes read and write.

    {"format": "fastconv measurements 1",
     "environments": {"torch 2.11.0, ...; NVIDIA H100 ...": {"conv2d_bias_act float32[...] ...":
         {"ms": {"triton": [0.11, 0.25], "aten": [0.13, 0.31]}, "failed": {"cuda": "..."}}}}}

A time is [forward] or [forward, backward]; "tuned": true marks an entry of a tuning run, which measures tiles too.
Entries of other versions and devices are kept and not used. Writers take an advisory lock (flock on a file beside),
read what is there, add their entry and replace the file: an entry that another process wrote first stays, so all
processes of a machine agree. A reader needs no lock: the file is replaced whole.

What cannot be read as this is renamed to <name>.set-aside with one warning; a folder that cannot be written leaves the
measurements in memory, with one line in the log. Neither is an error.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger("fastconv")

FORMAT = "fastconv measurements 1"
_NAME = "measurements.json"
_MOST_ENVIRONMENTS = 32  # every rebuild of the extension is one; the oldest go
_LOCK_SECONDS = 10.0  # a lock is held for milliseconds: who cannot get it in this time does without the disk

Entry = dict[str, dict]


def folder() -> Path:
    """FASTCONV_CACHE_DIR, else fastconv in the user's cache folder ($XDG_CACHE_HOME or ~/.cache)."""
    named = os.environ.get("FASTCONV_CACHE_DIR")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastconv"


def _is_time(value: object) -> bool:
    numbers = isinstance(value, list) and all(type(v) in (int, float) and 0 <= v < float("inf") for v in value)
    return numbers and len(value) in (1, 2)


def _defect(data: object) -> str:
    """What keeps ``data`` from being a file of this format; "" where nothing does."""
    if not isinstance(data, dict) or not isinstance(data.get("format"), str):
        return "it is not a file of fastconv"
    if data["format"] != FORMAT:
        return f"its format is {data['format']!r}, this version reads {FORMAT!r}"
    environments = data.get("environments")
    if not isinstance(environments, dict) or not all(isinstance(e, dict) for e in environments.values()):
        return "it holds no table of environments"
    for entries in environments.values():
        for key, entry in entries.items():
            times = entry.get("ms") if isinstance(entry, dict) else None
            if not isinstance(times, dict) or not all(map(_is_time, times.values())):
                return f"the entry {key!r} holds no times"
            if not isinstance(entry.get("failed", {}), dict):
                return f"the entry {key!r} holds no reasons"
    return ""


class Measurements:
    """The entries of one environment: in memory, and in ``directory`` where that can be written."""

    def __init__(self, directory: Path, environment: str) -> None:
        self.path, self.environment = directory / _NAME, environment
        self._told: set[str] = set()
        self.on_disk = True
        self._entries: dict[str, Entry] = {}
        self._entries = self._read().get(environment, {})

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> Entry | None:
        return self._entries.get(key)

    def put(self, key: str, entry: Entry, replace: bool = False) -> Entry:
        """Adds ``entry`` in memory and on disk. Returns the one that holds: another process may have been first."""
        self._entries[key] = entry
        if not self.on_disk:
            return entry
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked():
                environments = self._read()
                # Last in the order of use: the first ones go when there are too many.
                own = environments.pop(self.environment, {})
                environments[self.environment] = own
                if replace or not set(entry["ms"]) <= set(own.get(key, {}).get("ms", {})):
                    own[key] = entry
                for old in list(environments)[:-_MOST_ENVIRONMENTS]:
                    del environments[old]
                self._write({"format": FORMAT, "environments": environments})
            self._entries = own
        except OSError as error:
            self.on_disk = False
            log.info("measurements are kept in memory only: %s cannot be written (%s)", self.path, error)
        return self._entries[key]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.path.with_suffix(".lock"), "a") as lock:
            end = time.monotonic() + _LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > end:
                        raise
                    time.sleep(0.005)
            yield

    def _read(self) -> dict[str, dict[str, Entry]]:
        """The environments on disk; none where there is no file, or one that is not ours."""
        try:
            text = self.path.read_bytes()
        except FileNotFoundError:
            return {}
        except OSError as error:
            self._tell(f"{self.path} cannot be read and is not used: {error}")
            return {}
        try:
            data = json.loads(text)
            defect = _defect(data)
        except (ValueError, RecursionError) as error:
            defect = f"it is not JSON ({error})"
        if not defect:
            return data["environments"]
        aside = self.path.with_suffix(".json.set-aside")
        try:
            os.replace(self.path, aside)
            self._tell(f"{self.path} was set aside as {aside.name}: {defect}")
        except FileNotFoundError:
            pass  # another process was quicker
        except OSError:
            self._tell(f"{self.path} is not used: {defect}")
        return {}

    def _write(self, data: dict) -> None:
        name = self.path.with_name(f"{_NAME}.{os.getpid()}.tmp")  # of one writer: the lock is held
        try:
            with open(name, "w") as file:
                json.dump(data, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            log.warning("%s", text)
