"""Every way the training program ends early. `main` prints the message and returns the exit code: no tracebacks."""

from __future__ import annotations


class ProgramError(Exception):
    """Something went wrong that the user can act on."""

    exit_code = 1


class UsageError(ProgramError):
    """An argument that cannot be used (argparse's own exit code)."""

    exit_code = 2


class DataError(ProgramError):
    """A data set that is missing, partial or corrupt."""


class CheckpointError(ProgramError):
    """A checkpoint that cannot be read or written, or does not fit the arguments."""


class NonFiniteError(ProgramError):
    """The loss or a weight became NaN or infinite."""


class Interrupted(ProgramError):
    """Ctrl-C or SIGTERM. The exit code is the shell's: 128 + signal number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
