"""CIFAR-10 (Krizhevsky 2009) from a folder or the network, through torchvision and its checksums.

Nothing is ever trained on that has not passed torchvision's MD5 sums. What the user put in the folder is never repaired
or deleted in silence: a bad archive is an error that says what to do.
"""

from __future__ import annotations

import http.client
import shutil
import socket
import threading
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import torch
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import calculate_md5, check_integrity, download_url, extract_archive

from .errors import DataError

CONNECT_SECONDS = 6  # without a network `--dataset auto` must fall back quickly; a slow one still answers in this time
STALL_SECONDS = 20  # a download that delivers nothing for this long is given up


class Unavailable(Exception):
    """CIFAR-10 is neither in the folder nor to be had from the network. Not an error for `--dataset auto`."""


def prepare(root: Path, download: bool, log) -> str:
    """Makes sure that `root` holds a verified, unpacked CIFAR-10. Returns how it got there, in words.

    Raises DataError for a corrupt or partial copy, Unavailable when there is none and none can be fetched.
    """
    archive = root / CIFAR10.filename
    if not _bad_files(root):
        return f"found in {root}, checksums verified"
    if archive.exists():
        _verify_archive(archive)
        log(f"unpacking {archive}")
        _unpack(archive)
        origin = f"unpacked from {archive}, checksums verified"
    elif (root / CIFAR10.base_folder).exists():
        origin = "found"  # a partial copy: the check below says which files are bad
    elif not download:
        raise Unavailable(f"there is no CIFAR-10 in {root}, and --no-download forbids fetching it")
    else:
        _fetch(root, archive, log)
        _unpack(archive)
        origin = f"downloaded from {CIFAR10.url}, checksums verified"
    bad = _bad_files(root)
    if bad:
        raise DataError(
            f"the CIFAR-10 copy in {root / CIFAR10.base_folder} is corrupt or partial: {'; '.join(bad)}. "
            f"Delete that folder and run again."
        )
    return origin


def load(
    root: Path,
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor], tuple[str, ...]]:
    """(train, test, class names); each part is (images uint8 [N, 32, 32, 3], labels int64 [N])."""
    parts, classes = [], ()
    for train in (True, False):
        try:
            part = CIFAR10(str(root), train=train, download=False)  # verifies the checksums once more
        except RuntimeError as error:
            raise DataError(f"CIFAR-10 in {root}: {error}") from error
        parts.append((torch.from_numpy(part.data), torch.tensor(part.targets, dtype=torch.int64)))
        classes = tuple(part.classes)
    return parts[0], parts[1], classes


def _bad_files(root: Path) -> list[str]:
    files = [*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]]
    bad = []
    for name, md5 in files:
        path = root / CIFAR10.base_folder / name
        if not path.exists():
            bad.append(f"{name} is missing")
        elif not check_integrity(str(path), md5):
            bad.append(f"{name} has a wrong checksum")
    return bad


def _verify_archive(archive: Path) -> None:
    md5 = calculate_md5(str(archive))
    if md5 != CIFAR10.tgz_md5:
        raise DataError(
            f"{archive} is corrupt or partial: its MD5 sum is {md5}, expected {CIFAR10.tgz_md5} "
            f"({archive.stat().st_size:,} bytes). Delete it and run again."
        )


def _unpack(archive: Path) -> None:
    try:
        extract_archive(str(archive), str(archive.parent))
    except OSError as error:
        raise DataError(f"{archive} could not be unpacked: {error}") from error


def _fetch(root: Path, archive: Path, log) -> None:
    """Downloads beside its final place, so that a download cut short is never taken for the archive."""
    _require_network(CIFAR10.url)
    partial = root / ".download"
    log(f"downloading {CIFAR10.url} (170 MB) to {archive}")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with socket_timeout(STALL_SECONDS):
            download_url(CIFAR10.url, str(partial), CIFAR10.filename, CIFAR10.tgz_md5)
        (partial / CIFAR10.filename).replace(archive)
    except (
        OSError,
        RuntimeError,
    ) as error:  # URLError is an OSError; torchvision's bad checksum a RuntimeError
        raise Unavailable(f"CIFAR-10 could not be downloaded from {CIFAR10.url}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _require_network(url: str) -> None:
    """Asks for the archive's header. In a thread: a socket timeout does not bound the name look-up."""
    outcome: list[object] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            with urllib.request.urlopen(request, timeout=CONNECT_SECONDS) as response:
                outcome.append(response.status)
        except (OSError, http.client.HTTPException) as error:
            outcome.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS + 2)
    if not outcome:
        raise Unavailable(f"CIFAR-10 could not be fetched: no answer from {url} in {CONNECT_SECONDS + 2} s")
    if isinstance(outcome[0], Exception):
        raise Unavailable(f"CIFAR-10 could not be fetched from {url}: {outcome[0]}")


@contextmanager
def socket_timeout(seconds: float):
    """The default timeout of every socket opened inside: urllib's callers in torch and torchvision set none."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
