"""The data sets, and the one way a batch is made from them.

Images are uint8 [N, H, W, 3] on the training device; a batch is gathered, flipped, cropped and normalised there. What
happens to an image in an epoch follows from (seed, epoch, index) alone (`EpochPlan`), so a position in the epoch is all
that a resumed run needs, and both loaders give the same batches bit for bit.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import cifar
from .errors import DataError, UsageError

CROP_PADDING = 4  # He et al. 2016, section 4.2: 4 zero pixels on each side, then a random crop of the first size
LOADER_WORKERS = 2  # as PyTorch's CIFAR-10 tutorial


@dataclass(frozen=True)
class Part:
    images: Tensor  # uint8 [N, H, W, 3]
    labels: Tensor  # int64 [N]

    def __len__(self) -> int:
        return self.labels.shape[0]

    def to(self, device: torch.device) -> Part:
        return Part(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    name: str
    origin: str  # where it came from and why it was taken, in words
    train: Part
    test: Part
    classes: tuple[str, ...]
    mirrors: bool  # may an image be flipped left to right and keep its class?

    def fingerprint(self) -> str:
        """CRC-32 of all images and labels: two runs with the same one trained on the same data."""
        value = 0
        for part in (self.train, self.test):
            for tensor in (part.images, part.labels):
                value = zlib.crc32(tensor.contiguous().numpy().tobytes(), value)
        return f"{value:08x}"


# ---------------------------------------------------------------------------------------------------- the data sets


def load_dataset(name: str, root: Path, download: bool, log) -> Dataset:
    """name: cifar10 | digits | synthetic | auto (CIFAR-10 if it is in `root` or can be fetched, else digits)."""
    if name == "digits":
        return _digits()
    if name == "synthetic":
        return _synthetic()
    try:
        origin = cifar.prepare(root, download, log)
    except cifar.Unavailable as reason:
        if name == "cifar10":
            raise DataError(
                f"{reason}. Put cifar-10-python.tar.gz into {root}, or take --dataset digits (no download needed)."
            ) from reason
        return _digits(f", taken by --dataset auto because {reason}")
    train, test, classes = cifar.load(root)
    return Dataset("cifar10", origin, Part(*train), Part(*test), classes, mirrors=True)


def _digits(why: str = "") -> Dataset:
    """scikit-learn's 1,797 real handwritten digits (UCI, 8x8 pixels of 0..16), enlarged to 32x32x3."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UsageError("--dataset digits needs scikit-learn: pip install scikit-learn") from error
    digits = load_digits()
    pixels = torch.from_numpy(digits.images).float().unsqueeze(1) * (255 / 16)
    large = F.interpolate(pixels, size=(32, 32), mode="bilinear", align_corners=False)
    images = large.round().to(torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()
    labels = torch.from_numpy(digits.target).long()
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(labels)))  # NumPy keeps this stream frozen
    train, test = order[:1437], order[1437:]
    return Dataset(
        "digits",
        f"scikit-learn's handwritten digits{why}",
        Part(images[train], labels[train]),
        Part(images[test], labels[test]),
        tuple("0123456789"),
        mirrors=False,  # a mirrored 2 is no 2
    )


def _synthetic(train: int = 2048, test: int = 512, classes: int = 10) -> Dataset:
    """A smooth random pattern for each class, half as strong as the noise over it. The same in every run."""
    generator = torch.Generator().manual_seed(0)
    patterns = F.interpolate(torch.randn(classes, 3, 4, 4, generator=generator), size=(32, 32), mode="bicubic")
    labels = torch.arange(train + test) % classes
    noise = torch.randn(train + test, 3, 32, 32, generator=generator)
    pixels = 128 + 24 * patterns[labels] + 48 * noise
    images = pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    names = tuple(f"pattern {i}" for i in range(classes))
    origin = "random patterns with noise, made by the program"
    return Dataset(
        "synthetic",
        origin,
        Part(images[:train], labels[:train]),
        Part(images[train:], labels[train:]),
        names,
        mirrors=False,
    )


# ---------------------------------------------------------------------------------------------- images to batches


@dataclass(frozen=True)
class EpochPlan:
    """What happens in one epoch, by place in it: the image and its augmentation.

    tickets: int64 [N, 1], the index of the image; with augmentation [N, 3], then the shift in rows and columns, 0 to
    2 * CROP_PADDING; with mirrored images [N, 4], 1 where it is mirrored.
    """

    tickets: Tensor

    @property
    def order(self) -> Tensor:
        return self.tickets[:, 0]

    @property
    def shifts(self) -> Tensor | None:
        return self.tickets[:, 1:3] if self.tickets.shape[1] > 1 else None

    @property
    def flips(self) -> Tensor | None:
        return self.tickets[:, 3].bool() if self.tickets.shape[1] > 3 else None

    @staticmethod
    def draw(count: int, seed: int, epoch: int, augment: bool, mirrors: bool) -> EpochPlan:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        columns = [torch.randperm(count, generator=generator)[:, None]]
        if augment:
            columns.append(torch.randint(0, 2 * CROP_PADDING + 1, (count, 2), generator=generator))
            flips = torch.rand(count, generator=generator) < 0.5
            columns += [flips[:, None].long()] if mirrors else []
        return EpochPlan(torch.cat(columns, 1))

    def take(self, images: Tensor, places: slice | int) -> Tensor:
        """The images at these places of the epoch, augmented: uint8 [B, H, W, 3]."""
        if isinstance(places, int):
            places = slice(places, places + 1)
        return redeem(images, self.tickets[places])


def redeem(images: Tensor, tickets: Tensor) -> Tensor:
    """The images of these tickets, augmented: uint8 [B, H, W, 3]. Never waits for the device."""
    plan = EpochPlan(tickets)
    batch = images[plan.order]
    if plan.shifts is None:
        return batch
    size, height, width = batch.shape[:3]
    rows = torch.arange(height, device=batch.device) + plan.shifts[:, 0, None]
    columns = torch.arange(width, device=batch.device) + plan.shifts[:, 1, None]
    if plan.flips is not None:
        columns = torch.where(plan.flips[:, None], columns.flip(1), columns)
    padded = F.pad(batch, (0, 0, CROP_PADDING, CROP_PADDING, CROP_PADDING, CROP_PADDING))
    image = torch.arange(size, device=batch.device)[:, None, None]
    return padded[image, rows[:, :, None], columns[:, None, :]]


def normalize(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> fp32 [B, 3, H, W] in -1..1, channels_last.

    The operations of ToTensor and Normalize(0.5, 0.5), in their order, so that the result is theirs bit for bit.
    """
    return images.permute(0, 3, 1, 2).float().div_(255).sub_(0.5).div_(0.5)


def enlarge(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)


class Batches:
    """Training batches (fp32 [B, 3, S, S] channels_last, int64 [B]) on `device`, from any step on, without an end.

    `rank` of `ranks` processes takes its share of each global batch of `batch_size * ranks`. The images that do not
    fill a last batch sit out this epoch (BatchNorm cannot train on a batch of one, and a CUDA graph wants one shape).
    """

    def __init__(self, part: Part, mirrors: bool, args, device: torch.device, rank: int = 0, ranks: int = 1) -> None:
        self.args, self.device, self.mirrors = args, device, mirrors
        self.part = part if args.loader == "torch" else part.to(device)
        self.global_batch = args.batch_size * ranks
        self.first = rank * args.batch_size
        self.steps_per_epoch = len(part) // self.global_batch
        if self.steps_per_epoch == 0:
            raise UsageError(
                f"--batch-size {args.batch_size} on {ranks} process(es) is more than the {len(part):,} training images"
            )

    def stream(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of steps `step`, `step + 1`, ... (counted over all epochs)."""
        return (self.make(*raw) for raw in self.raw(step))

    def make(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The batch of what `raw` gives; made by the device alone, so that a CUDA graph can hold it."""
        images = x if self.args.loader == "torch" else normalize(redeem(self.part.images, x))
        return enlarge(images, self.args.image_size), y

    def raw(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(tickets, labels) of steps `step`, `step + 1`, ...; from a DataLoader (images, labels)."""
        read = self._read_with_dataloader if self.args.loader == "torch" else self._read_on_device
        epoch, offset = divmod(step, self.steps_per_epoch)
        while True:
            plan = EpochPlan.draw(len(self.part), self.args.seed, epoch, self.args.augment, self.mirrors)
            yield from read(plan, offset)
            epoch, offset = epoch + 1, 0

    def _places(self, step: int) -> slice:
        start = step * self.global_batch + self.first
        return slice(start, start + self.args.batch_size)

    def _read_on_device(self, plan: EpochPlan, offset: int) -> Iterator[tuple[Tensor, Tensor]]:
        tickets = plan.tickets.to(self.device)
        labels = self.part.labels[tickets[:, 0]]
        for step in range(offset, self.steps_per_epoch):
            places = self._places(step)
            yield tickets[places], labels[places]

    def _read_with_dataloader(self, plan: EpochPlan, offset: int) -> Iterator[tuple[Tensor, Tensor]]:
        slices = (self._places(step) for step in range(offset, self.steps_per_epoch))
        places = [list(range(places.start, places.stop)) for places in slices]
        loader = torch.utils.data.DataLoader(
            _EpochImages(self.part, plan),
            batch_sampler=places,
            num_workers=LOADER_WORKERS,
            pin_memory=self.device.type == "cuda",
        )
        for images, labels in loader:
            images = images.to(self.device, non_blocking=True)
            yield images.to(memory_format=torch.channels_last), labels.to(self.device, non_blocking=True)


class _EpochImages(torch.utils.data.Dataset):
    """The epoch's images one by one, as the DataLoader's workers make them: by place in the epoch."""

    def __init__(self, part: Part, plan: EpochPlan) -> None:
        self.part, self.plan = part, plan

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        return normalize(self.plan.take(self.part.images, place))[0], self.part.labels[self.plan.order[place]]
