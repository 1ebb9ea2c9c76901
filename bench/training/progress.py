"""A tqdm bar where stderr is a terminal, plain lines on stdout everywhere else."""

from __future__ import annotations

import sys
import time


class Progress:
    """Shows where the training stands. Only the main process of several shows anything."""

    def __init__(self, total: int, done: int, visible: bool) -> None:
        self.visible, self.total, self.done = visible, total, done
        self.start, self.first = time.perf_counter(), done
        self.bar = None
        if visible and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True, leave=False)

    def advance(self, steps: int, **shown: str) -> None:
        self.done += steps
        if self.bar is not None:
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(steps)

    def time_left(self) -> str:
        """Minutes and seconds at the pace so far, as 3:07."""
        steps = self.done - self.first
        if steps == 0:
            return "?"
        seconds = round((time.perf_counter() - self.start) / steps * (self.total - self.done))
        hours, seconds = divmod(seconds, 3600)
        return f"{hours}:{seconds // 60:02d}:{seconds % 60:02d}" if hours else f"{seconds // 60}:{seconds % 60:02d}"

    def line(self, text: str) -> None:
        if not self.visible:
            return
        if self.bar is not None:
            self.bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
