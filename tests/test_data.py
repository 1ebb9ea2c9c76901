"""The training program's data: the archive's checks, the data sets, the batches."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import pickle
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torchvision.datasets import CIFAR10

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from training import cifar, data  # noqa: E402
from training.errors import DataError, UsageError  # noqa: E402

CPU = torch.device("cpu")


def batch_settings(**changes) -> SimpleNamespace:
    settings = {"loader": "device", "batch_size": 8, "seed": 0, "augment": False, "image_size": 32}
    return SimpleNamespace(**{**settings, **changes})


def take(batches: data.Batches, count: int, step: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    stream = batches.stream(step)
    return [next(stream) for _ in range(count)]


@pytest.fixture(scope="module")
def synthetic() -> data.Dataset:
    return data.load_dataset("synthetic", Path("unused"), False, print)


# ----------------------------------------------------------------------------------------------------------- CIFAR-10


@pytest.fixture
def tiny_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a CIFAR-10 archive of 12 images, whose checksums torchvision is told to be the right ones."""
    generator = np.random.RandomState(0)
    contents = {}
    for name, _ in [*CIFAR10.train_list, *CIFAR10.test_list]:
        pixels = generator.randint(0, 256, (2, 3072), dtype=np.uint8)
        contents[name] = pickle.dumps({"data": pixels, "labels": [int(x) for x in generator.randint(0, 10, 2)]})
    contents["batches.meta"] = pickle.dumps({"label_names": [f"class {i}" for i in range(10)]})
    archive = tmp_path / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in contents.items():
            info = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(CIFAR10, "train_list", [[name, md5[name]] for name, _ in CIFAR10.train_list])
    monkeypatch.setattr(CIFAR10, "test_list", [[name, md5[name]] for name, _ in CIFAR10.test_list])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5["batches.meta"]})
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    return tmp_path


def test_cifar10_is_unpacked_verified_and_read(tiny_cifar: Path) -> None:
    dataset = data.load_dataset("cifar10", tiny_cifar, False, print)
    assert (len(dataset.train), len(dataset.test), len(dataset.classes)) == (10, 2, 10)
    assert dataset.train.images.dtype == torch.uint8 and dataset.train.images.shape == (10, 32, 32, 3)
    raw = pickle.loads((tiny_cifar / CIFAR10.base_folder / "data_batch_1").read_bytes())
    assert torch.equal(dataset.train.images[0].permute(2, 0, 1).flatten(), torch.from_numpy(raw["data"][0]))
    assert "unpacked" in dataset.origin
    assert "found" in data.load_dataset("auto", tiny_cifar, False, print).origin


def test_an_archive_cut_short_is_an_error_and_no_reason_for_digits(tiny_cifar: Path) -> None:
    archive = tiny_cifar / CIFAR10.filename
    archive.write_bytes(archive.read_bytes()[:-100])
    for name in ("cifar10", "auto"):
        with pytest.raises(DataError, match=r"cifar-10-python.tar.gz is corrupt or partial.*Delete it"):
            data.load_dataset(name, tiny_cifar, False, print)
    assert not (tiny_cifar / CIFAR10.base_folder).exists()


def test_a_damaged_folder_is_restored_from_a_good_archive_and_an_error_without(tiny_cifar: Path) -> None:
    data.load_dataset("cifar10", tiny_cifar, False, print)
    file = tiny_cifar / CIFAR10.base_folder / "data_batch_3"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + b"?")
    data.load_dataset("cifar10", tiny_cifar, False, print)
    assert file.read_bytes() == good
    (tiny_cifar / CIFAR10.filename).unlink()
    file.write_bytes(good[:-1] + b"?")
    (tiny_cifar / CIFAR10.base_folder / "test_batch").unlink()
    for name in ("cifar10", "auto"):
        with pytest.raises(DataError, match="data_batch_3 has a wrong checksum; test_batch is missing"):
            data.load_dataset(name, tiny_cifar, False, print)


def test_auto_says_why_it_took_digits(tmp_path: Path) -> None:
    dataset = data.load_dataset("auto", tmp_path, False, print)
    assert dataset.name == "digits"
    assert f"because there is no CIFAR-10 in {tmp_path}" in dataset.origin
    with pytest.raises(DataError, match="--dataset digits"):
        data.load_dataset("cifar10", tmp_path, False, print)


def test_a_dead_network_is_given_up_quickly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")  # nothing listens on port 9
    with pytest.raises(cifar.Unavailable, match="127.0.0.1"):
        cifar.prepare(tmp_path, True, print)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that a web server on this machine serves as CIFAR-10's home."""
    folder = tmp_path / "server"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{web.server_port}/{CIFAR10.filename}")
        yield folder
        web.shutdown()


def test_cifar10_is_downloaded_and_verified(tiny_cifar: Path, server: Path) -> None:
    (tiny_cifar / CIFAR10.filename).rename(server / CIFAR10.filename)
    dataset = data.load_dataset("auto", tiny_cifar, True, print)
    assert (dataset.name, len(dataset.train)) == ("cifar10", 10)
    assert dataset.origin.startswith("downloaded from http://127.0.0.1")


def test_a_download_that_is_not_the_archive_leaves_nothing_behind(tmp_path: Path, server: Path) -> None:
    (server / CIFAR10.filename).write_bytes(b"a proxy's error page")
    root = tmp_path / "data"
    root.mkdir()
    with pytest.raises(cifar.Unavailable, match="could not be downloaded"):
        cifar.prepare(root, True, print)
    assert not list(root.iterdir())


# ------------------------------------------------------------------------------------------------ the other data sets


def test_digits_are_sklearns_with_a_fixed_split() -> None:
    dataset = data.load_dataset("digits", Path("unused"), True, print)
    assert (len(dataset.train), len(dataset.test)) == (1437, 360)
    assert dataset.train.images.shape[1:] == (32, 32, 3) and dataset.train.images.dtype == torch.uint8
    assert int(dataset.train.images.max()) > 200
    both = torch.cat([dataset.train.labels, dataset.test.labels])
    assert torch.bincount(both).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # as UCI counts them
    assert dataset.fingerprint() == data.load_dataset("digits", Path("unused"), True, print).fingerprint()


def test_synthetic_images_tell_their_class(synthetic: data.Dataset) -> None:
    """The nearest class mean of the training images finds the class of nearly every test image."""
    train, test = (part.images.float().flatten(1) for part in (synthetic.train, synthetic.test))
    means = torch.stack([train[synthetic.train.labels == label].mean(0) for label in range(10)])
    found = torch.cdist(test, means).argmin(1)
    assert (found == synthetic.test.labels).float().mean() > 0.95


# ------------------------------------------------------------------------------------------------------------ batches


def test_normalisation_is_torchvisions_bit_for_bit(synthetic: data.Dataset) -> None:
    images = synthetic.train.images[:4]
    expected = [TF.normalize(TF.to_tensor(Image.fromarray(image.numpy())), [0.5] * 3, [0.5] * 3) for image in images]
    ours = data.normalize(images)
    assert torch.equal(ours, torch.stack(expected))
    assert ours.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("augment", [False, True])
def test_both_loaders_give_the_same_batches(synthetic: data.Dataset, augment: bool) -> None:
    part = data.Part(synthetic.train.images[:40], synthetic.train.labels[:40])
    made = [
        take(data.Batches(part, True, batch_settings(loader=loader, augment=augment), CPU), 7)  # 5 make an epoch
        for loader in ("device", "torch")
    ]
    for (images, labels), (other_images, other_labels) in zip(*made, strict=True):
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)
        assert images.is_contiguous(memory_format=torch.channels_last) and images.shape == (8, 3, 32, 32)
        assert other_images.stride() == images.stride()


def test_a_stream_can_start_anywhere(synthetic: data.Dataset) -> None:
    part = data.Part(synthetic.train.images[:40], synthetic.train.labels[:40])
    batches = data.Batches(part, True, batch_settings(augment=True), CPU)
    whole = take(batches, 12)
    for start in (3, 5, 7, 10):
        for (images, labels), (expected, expected_labels) in zip(
            take(batches, 2, start), whole[start : start + 2], strict=True
        ):
            assert torch.equal(images, expected) and torch.equal(labels, expected_labels)


def test_an_epoch_shows_every_image_once_and_the_next_in_another_order(synthetic: data.Dataset) -> None:
    part = data.Part(synthetic.train.images[:40], torch.arange(40))
    labels = [labels for _, labels in take(data.Batches(part, False, batch_settings(), CPU), 10)]
    first, second = torch.cat(labels[:5]), torch.cat(labels[5:])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(40))
    assert first.tolist() != second.tolist()


def test_processes_share_each_batch(synthetic: data.Dataset) -> None:
    part = data.Part(synthetic.train.images[:40], torch.arange(40))
    alone = data.Batches(part, False, batch_settings(batch_size=8), CPU)
    shares = [data.Batches(part, False, batch_settings(batch_size=4), CPU, rank, 2) for rank in (0, 1)]
    for (_, whole), (_, low), (_, high) in zip(take(alone, 5), take(shares[0], 5), take(shares[1], 5), strict=True):
        assert whole.tolist() == low.tolist() + high.tolist()


def test_augmentation_crops_and_mirrors_as_torchvision_would(synthetic: data.Dataset) -> None:
    images = synthetic.train.images[:64]
    plan = data.EpochPlan.draw(64, seed=3, epoch=0, augment=True, mirrors=True)
    ours = plan.take(images, slice(0, 64))
    assert plan.flips.any() and not plan.flips.all() and len(plan.shifts.unique(dim=0)) > 20
    for place, image in enumerate(ours):
        source = images[plan.order[place]].permute(2, 0, 1)
        top, left = plan.shifts[place].tolist()
        expected = TF.crop(TF.pad(source, [data.CROP_PADDING]), top, left, 32, 32)
        expected = TF.hflip(expected) if plan.flips[place] else expected
        assert torch.equal(image.permute(2, 0, 1), expected)
    assert data.EpochPlan.draw(64, 3, 0, augment=True, mirrors=False).flips is None


def test_a_batch_larger_than_the_data_is_refused(synthetic: data.Dataset) -> None:
    with pytest.raises(UsageError, match="--batch-size 4096 .* 2,048 training images"):
        data.Batches(synthetic.train, False, batch_settings(batch_size=4096), CPU)
