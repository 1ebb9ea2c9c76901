"""The training loop: blocks of steps, with the checks, the log and the checkpoints between them; and the evaluation.

A block is what runs without the host looking: one step on the CPU, up to CUDA_BLOCK on a GPU, where a look costs a
sync. In a comparison every trainee trains on the block's batches before the next block comes, and who goes first
alternates.
"""

from __future__ import annotations

import itertools
import math
import os
import signal
from pathlib import Path

import torch

from . import checkpoint
from .data import Batches, Part, enlarge, normalize
from .errors import Interrupted, NonFiniteError
from .progress import Progress
from .settings import total_steps
from .trainee import Trainee, autocast

CUDA_BLOCK = 20  # at 1 ms per step one sync in 20 ms; and a bad loss is seen 20 steps late at worst
WARMUP_STEPS = {
    "cpu": 3,
    "cuda": 2 * CUDA_BLOCK,
}  # left out of the timings: first touches, tuning, graph capture
EVALUATION_BATCH = 500


class StopRequest:
    """Ctrl-C and SIGTERM ask the loop to stop after the step; a second one stops at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _frame) -> None:
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.write(2, b"\nstopping after this step (once more: stop at once)\n")  # print is not safe in a handler


class Loop:
    def __init__(self, trainees: list[Trainee], batches: Batches, args, ranks, common: dict, tensorboard=None) -> None:
        """common: what a checkpoint holds besides the trainees and the position."""
        self.trainees, self.batches, self.args, self.ranks = trainees, batches, args, ranks
        self.common, self.tensorboard = common, tensorboard
        self.path: Path = args.report / "checkpoint.pt"
        self.total = total_steps(args, batches.steps_per_epoch)
        self.step = len(trainees[0].losses)  # steps done, over all epochs
        self.saved_step = self.step if self.step else None  # of the last good checkpoint
        self.stop = StopRequest()

    def run(self) -> None:
        """Trains to the last step. Raises NonFiniteError or Interrupted, the checkpoint then as fresh as can be."""
        warm_from = self.step + WARMUP_STEPS[self.args.device.type]
        stream = self.batches.raw(self.step)
        progress = Progress(self.total, self.step, visible=self.ranks.main)
        try:
            order = self.trainees
            while self.step < self.total:
                block = list(itertools.islice(stream, self._block_length()))
                made = [self.batches.make(*raw) for raw in block] if any(t.prepare is None for t in order) else []
                warm = self.step >= warm_from
                losses = {t.name: t.run(made if t.prepare is None else block, self.step, warm) for t in order}
                order = order[::-1]
                stopping = self._share(losses)
                self._check(losses)
                for trainee in self.trainees:
                    trainee.losses += losses[trainee.name]
                self.step += len(block)
                self._show(progress, len(block))
                if stopping:
                    self._stop()
                if self.args.checkpoint_every and self.step % self.args.checkpoint_every == 0:
                    self.save()
        finally:
            progress.close()
        if self.saved_step != self.step:
            self.save()

    def _block_length(self) -> int:
        """Up to the next line of the log, checkpoint, end of epoch or end."""
        in_epoch = self.step % self.batches.steps_per_epoch
        length = CUDA_BLOCK if self.args.device.type == "cuda" else 1
        length = min(length, self.total - self.step, self.batches.steps_per_epoch - in_epoch)
        length = min(length, self.args.log_every - in_epoch % self.args.log_every)
        if self.args.checkpoint_every:
            length = min(length, self.args.checkpoint_every - self.step % self.args.checkpoint_every)
        return length

    def _share(self, losses: dict[str, list[float]]) -> bool:
        """Makes the losses means over all processes. Is any of them asked to stop?"""
        flat = [value for trainee in self.trainees for value in losses[trainee.name]]
        *flat, stopping = self.ranks.sum([*flat, float(self.stop.signal is not None)])
        flat_values = iter(flat)
        for trainee in self.trainees:
            losses[trainee.name] = [next(flat_values) / self.ranks.count for _ in losses[trainee.name]]
        return stopping > 0

    # ------------------------------------------------------------------------------------------- checks, checkpoints

    def _check(self, losses: dict[str, list[float]]) -> None:
        for name, values in losses.items():
            for offset, value in enumerate(values):
                if not math.isfinite(value):
                    self._refuse(f"the loss of {name} is {value}", self.step + offset)

    def _refuse(self, what: str, step: int) -> None:
        epoch, in_epoch = divmod(step, self.batches.steps_per_epoch)
        last = "there is no checkpoint of this run yet"
        if self.saved_step is not None:
            last = f"the last good checkpoint is {self.path}, after step {self.saved_step}"
        raise NonFiniteError(
            f"{what} at epoch {epoch + 1} step {in_epoch + 1} (step {step + 1} of {self.total}), "
            f"learning rate {self.args.lr:g}; {last}"
        )

    def save(self) -> None:
        """Writes the checkpoint, unless a weight is not finite: a poisoned one never replaces a good one."""
        for trainee in self.trainees:
            bad = trainee.poisoned()
            if bad is not None:
                self._refuse(f"{bad} of {trainee.name} is no longer finite after the update", self.step - 1)
        epoch, in_epoch = divmod(self.step, self.batches.steps_per_epoch)
        state = {
            **self.common,
            "format": checkpoint.FORMAT,
            "ranks": self.ranks.count,
            "step": self.step,
            "epoch": epoch,
            "step_in_epoch": in_epoch,
            "trainees": {trainee.name: trainee.state_dict(self.ranks) for trainee in self.trainees},
        }
        if self.ranks.main:
            checkpoint.save(self.path, state)
        self.saved_step = self.step

    def _stop(self) -> None:
        self.save()
        number = self.stop.signal or signal.SIGINT
        raise Interrupted(
            f"stopped by {signal.Signals(number).name} after step {self.step} of {self.total}; "
            f"go on with --resume from {self.path}",
            number,
        )

    # ------------------------------------------------------------------------------------------------------- the log

    def _show(self, progress: Progress, steps: int) -> None:
        """The bar, and every --log-every steps the mean loss since the last line, as PyTorch's tutorial prints it."""
        rate = " / ".join(f"{self._images_per_second(trainee):,.0f}" for trainee in self.trainees)
        latest = " / ".join(f"{t.losses[-1]:.3f}" for t in self.trainees)
        progress.advance(steps, loss=latest, images_per_s=rate)
        if self.tensorboard is not None:
            self._write_events(steps)
        epoch, in_epoch = divmod(self.step - 1, self.batches.steps_per_epoch)
        if (in_epoch + 1) % self.args.log_every:
            return
        means = [sum(t.losses[-self.args.log_every :]) / self.args.log_every for t in self.trainees]
        if len(self.trainees) == 1:
            shown = f"{means[0]:.3f}"
        else:
            shown = "  ".join(f"{mean:.3f} {t.name}" for mean, t in zip(means, self.trainees, strict=True))
        text = f"[{epoch + 1}, {in_epoch + 1:5d}] loss: {shown}"
        if self.args.recipe != "origin":  # whose lines are the tutorial's, to the letter
            text += f" | {rate} images/s | {progress.time_left()} left"
        progress.line(text)

    def _images_per_second(self, trainee: Trainee) -> float:
        recent = trainee.blocks[-20:]
        steps = sum(block.steps for block in recent)
        return steps * self.batches.global_batch / sum(block.seconds for block in recent)

    def _write_events(self, steps: int) -> None:
        for trainee in self.trainees:
            for step in range(self.step - steps, self.step):
                self.tensorboard.add_scalar(f"loss/{trainee.name}", trainee.losses[step], step + 1)
            self.tensorboard.add_scalar(f"ms_per_step/{trainee.name}", trainee.blocks[-1].ms_per_step, self.step)


@torch.no_grad()
def evaluate(trainee: Trainee, part: Part, args, ranks, stop: StopRequest) -> float:
    """The share of `part`'s images that the model classifies rightly. Each process looks at its share of them."""
    trainee.model.eval()
    images, labels = (
        part.images[ranks.rank :: ranks.count],
        part.labels[ranks.rank :: ranks.count].to(args.device),
    )
    correct = torch.zeros((), dtype=torch.int64, device=args.device)
    for start in range(0, len(labels), EVALUATION_BATCH):
        if stop.signal is not None and ranks.count == 1:
            text = f"stopped by {signal.Signals(stop.signal).name} while testing; the training is done and saved in"
            raise Interrupted(f"{text} {args.report / 'checkpoint.pt'}", stop.signal)
        batch = normalize(images[start : start + EVALUATION_BATCH].to(args.device))
        with autocast(args.device.type, trainee.dtype):
            logits = trainee.model(enlarge(batch, args.image_size))
        correct += (logits.argmax(1) == labels[start : start + EVALUATION_BATCH]).sum()
    trainee.model.train()
    return ranks.sum([float(correct.item())])[0] / len(part)
