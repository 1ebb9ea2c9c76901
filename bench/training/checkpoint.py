"""Checkpoints: written so that a killed process never leaves a broken one, read so that a bad one is never trusted."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import torch

from .errors import CheckpointError
from .settings import BINDING

FORMAT = 1
KEYS = {"format", "settings", "data", "ranks", "step", "epoch", "step_in_epoch", "weights", "trainees"}


def write_atomically(path: Path, write) -> None:
    """Calls `write(file)` on a new file beside `path`, which then takes its name in one move.

    At any moment `path` is either the whole old file or the whole new one: the new one is on the disk (fsync) before it
    gets the name, and the name is on the disk (fsync of the directory) before this returns.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save(path: Path, state: dict) -> None:
    try:
        write_atomically(path, lambda file: torch.save(state, file))
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise CheckpointError(f"the checkpoint {path} could not be written: {error}") from error


def load(path: Path) -> dict:
    """The checkpoint, on the CPU. Raises CheckpointError for anything that is not a whole one of this program."""
    if not path.is_file():
        raise CheckpointError(f"--resume: there is no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"the checkpoint {path} is damaged or none at all: {reason}") from error
    if not isinstance(state, dict) or not state.keys() >= KEYS:
        raise CheckpointError(f"{path} is no checkpoint of this program")
    if state["format"] != FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {state['format']}, this program reads format {FORMAT}")
    return state


def binding_settings(args, dataset_name: str) -> dict:
    settings = {name: getattr(args, name) for name in BINDING}
    return {**settings, "dataset": dataset_name}


def check_fits(path: Path, state: dict, args, dataset, ranks) -> None:
    """Raises CheckpointError, naming every argument that differs from the run that wrote the checkpoint."""
    now, then = binding_settings(args, dataset.name), state["settings"]
    different = [
        f"--{name.replace('_', '-')} was {then.get(name)}, now {value}"
        for name, value in now.items()
        if then.get(name) != value
    ]
    if state["ranks"] != ranks.count:
        different.append(f"processes were {state['ranks']}, now {ranks.count}")
    if not different and state["data"] != dataset.fingerprint():
        different.append(f"the images of {dataset.name} are not the same (checksum {state['data']})")
    if different:
        raise CheckpointError(f"{path} belongs to a run with other arguments: {'; '.join(different)}")
