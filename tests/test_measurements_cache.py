"""The file of measured times: many writers, defects, foreign files, folders that cannot be written."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastconv import _cache as cache
from fastconv._cache import FORMAT, Measurements

ENTRY = {"ms": {"cpu": [1.0, 2.0], "aten": [3.0]}}
SLOWER = {"ms": {"cpu": [9.0, 9.0], "aten": [1.0]}}


def content(directory: Path) -> dict:
    return json.loads((directory / "measurements.json").read_text())


def warnings_of(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_what_is_put_is_found_again(tmp_path):
    store = Measurements(tmp_path / "new" / "folder", "here")
    assert store.get("a") is None
    assert store.put("a", ENTRY) == ENTRY and store.get("a") == ENTRY
    again = Measurements(tmp_path / "new" / "folder", "here")
    assert again.get("a") == ENTRY and len(again) == 1
    assert Measurements(tmp_path / "new" / "folder", "another version or device").get("a") is None


def test_other_users_may_read(tmp_path):
    """The file has the mode that the umask gives, as any other file of the folder."""
    before = os.umask(0o022)
    try:
        Measurements(tmp_path, "here").put("a", ENTRY)
    finally:
        os.umask(before)
    assert (tmp_path / "measurements.json").stat().st_mode & 0o777 == 0o644


def test_the_first_writer_wins_and_the_other_hears_of_it(tmp_path):
    one, two = Measurements(tmp_path, "here"), Measurements(tmp_path, "here")
    one.put("a", ENTRY)
    assert two.put("a", SLOWER) == ENTRY and two.get("a") == ENTRY
    assert two.put("a", SLOWER, replace=True) == SLOWER, "measured again on purpose"
    more = {"ms": SLOWER["ms"] | {"triton": [1.0]}}
    assert one.put("a", more) == more, "a backend more than before"
    assert content(tmp_path)["environments"]["here"]["a"] == more


def test_other_environments_are_kept(tmp_path):
    Measurements(tmp_path, "there").put("a", SLOWER)
    Measurements(tmp_path, "here").put("a", ENTRY)
    assert content(tmp_path) == {"format": FORMAT, "environments": {"there": {"a": SLOWER}, "here": {"a": ENTRY}}}


def test_old_environments_make_room(tmp_path):
    for i in range(cache._MOST_ENVIRONMENTS + 3):
        Measurements(tmp_path, f"build {i}").put("a", ENTRY)
    kept = list(content(tmp_path)["environments"])
    assert kept == [f"build {i}" for i in range(3, cache._MOST_ENVIRONMENTS + 3)]


WRITER = """
import sys
from pathlib import Path
from fastconv._cache import Measurements
store = Measurements(Path(sys.argv[1]), "here")
for i in range(60):
    store.put(f"{sys.argv[2]} {i}", {"ms": {"cpu": [float(i)]}})
    store.put(f"both {i}", {"ms": {"cpu": [float(sys.argv[3])]}})
print([store.get(f"both {i}")["ms"]["cpu"][0] for i in range(60)])
"""


def test_two_processes_write_at_once(tmp_path):
    """Nothing is lost, no reader ever sees half a file, and both end with the same times for what both measured."""
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [
        subprocess.Popen([*command, name, number], stdout=subprocess.PIPE, text=True)
        for name, number in (("one", "1"), ("two", "2"))
    ]
    while any(w.poll() is None for w in writers):
        if (tmp_path / "measurements.json").exists():
            assert cache._defect(content(tmp_path)) == ""
    outputs = [w.communicate()[0] for w in writers]
    assert all(w.returncode == 0 for w in writers)
    found = content(tmp_path)["environments"]["here"]
    assert set(found) == {f"{name} {i}" for name in ("one", "two", "both") for i in range(60)}
    assert outputs[0] == outputs[1] and {entry["ms"]["cpu"][0] for entry in found.values()} >= {1.0, 2.0}
    assert {p.name for p in tmp_path.iterdir()} == {"measurements.json", "measurements.lock"}, "no temporary file stays"


BROKEN = {
    "truncated": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "not_text": lambda text: "\udcff\udcfe",
    "deeply_nested": lambda text: "[" * 100_000,
    "another_program": lambda text: '{"version": 3}',
    "a_list": lambda text: "[1, 2]",
    "another_format": lambda text: text.replace(FORMAT, "fastconv measurements 99"),
    "no_table": lambda text: json.dumps({"format": FORMAT, "environments": 3}),
    "no_times": lambda text: json.dumps({"format": FORMAT, "environments": {"here": {"a": {"ms": {"cpu": "fast"}}}}}),
    "infinite_time": lambda text: text.replace("1.0", "Infinity"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_or_foreign_file_is_set_aside(how, tmp_path, caplog):
    Measurements(tmp_path, "here").put("a", ENTRY)
    path = tmp_path / "measurements.json"
    broken = BROKEN[how](path.read_text()).encode("utf-8", "surrogateescape")
    path.write_bytes(broken)
    store = Measurements(tmp_path, "here")
    assert len(store) == 0
    store.put("b", ENTRY)
    store.put("c", ENTRY)
    assert set(Measurements(tmp_path, "here")._entries) == {"b", "c"}
    assert (tmp_path / "measurements.json.set-aside").read_bytes() == broken
    (told,) = warnings_of(caplog)
    assert "was set aside as measurements.json.set-aside" in told


def unwritable_by_file(tmp_path):
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "cache"


def unwritable_by_mode(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root writes into read-only folders too")
    tmp_path.chmod(0o500)
    return tmp_path


@pytest.mark.parametrize("make", [unwritable_by_file, unwritable_by_mode])
def test_a_folder_that_cannot_be_written_leaves_memory(make, tmp_path, caplog):
    caplog.set_level(logging.INFO, "fastconv")
    store = Measurements(make(tmp_path), "here")
    for key in ("a", "b", "c"):
        assert store.put(key, ENTRY) == ENTRY and store.get(key) == ENTRY
    told = [r.getMessage() for r in caplog.records if "in memory only" in r.getMessage()]
    assert len(told) == 1 and not store.on_disk


def test_a_read_only_folder_is_still_read(tmp_path, monkeypatch):
    Measurements(tmp_path, "here").put("a", ENTRY)

    def refuse(*_, **__):
        raise PermissionError(13, "read-only file system")

    monkeypatch.setattr(Measurements, "_write", refuse)
    store = Measurements(tmp_path, "here")
    assert store.get("a") == ENTRY
    assert store.put("b", ENTRY) == ENTRY and store.get("b") == ENTRY and store.get("a") == ENTRY
    assert "b" not in content(tmp_path)["environments"]["here"]


def test_a_lock_that_is_never_given_up_stops_nobody(tmp_path, monkeypatch, caplog):
    import fcntl

    caplog.set_level(logging.INFO, "fastconv")
    monkeypatch.setattr(cache, "_LOCK_SECONDS", 0.05)
    with open(tmp_path / "measurements.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        store = Measurements(tmp_path, "here")
        assert store.put("a", ENTRY) == ENTRY and store.get("a") == ENTRY
    assert any("in memory only" in r.getMessage() for r in caplog.records)


def test_where_the_folder_is(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTCONV_CACHE_DIR", str(tmp_path))
    assert cache.folder() == tmp_path
    monkeypatch.delenv("FASTCONV_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder() == tmp_path / "xdg" / "fastconv"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "fastconv"
