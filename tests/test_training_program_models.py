"""The training program's settings, models and losses, called directly."""

from __future__ import annotations

import sys
import urllib.error
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from training import models  # noqa: E402
from training.errors import ProgramError, UsageError  # noqa: E402
from training.settings import parse, total_steps  # noqa: E402
from training_util import settings  # noqa: E402

# -------------------------------------------------------------------------------------------------- settings


def test_the_origin_recipe_is_the_original_script(tmp_path: Path) -> None:
    args = settings(tmp_path, "--recipe", "origin")
    wanted = {
        **{
            "backend": "stock",
            "model": "resnet50",
            "stem": "imagenet",
            "dataset": "cifar10",
            "pretrained": "preferred",
        },
        **{"batch_size": 4, "optimizer": "sgd", "lr": 0.001, "momentum": 0.9, "weight_decay": 0.0, "epochs": 2},
        **{"loss": "cross_entropy", "label_smoothing": 0.0, "precision": "fp32", "log_every": 2000, "augment": False},
        **{"max_steps": None, "dropout": None, "activation": None, "freeze_backbone": False, "image_size": 32},
    }
    assert {name: getattr(args, name) for name in wanted} == wanted
    assert total_steps(args, steps_per_epoch=12_500) == 25_000
    assert args.device.type == "cpu"
    changed = settings(tmp_path, "--recipe=origin", "--lr", "0.1", "--max-steps", "7", "--pretrained")
    assert (changed.lr, changed.pretrained, total_steps(changed, 12_500)) == (0.1, "required", 7)


def test_max_steps_alone_takes_as_many_epochs_as_it_needs(tmp_path: Path) -> None:
    assert total_steps(settings(tmp_path, "--max-steps", "50"), steps_per_epoch=22) == 50
    assert total_steps(settings(tmp_path, "--max-steps", "50", "--epochs", "2"), steps_per_epoch=22) == 44
    assert total_steps(settings(tmp_path), steps_per_epoch=22) == 22


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "many"], "expected a whole number, got 'many'"),
        (["--lr", "nan"], "argument --lr: must be more than 0, got nan"),
        (["--lr", "inf"], "argument --lr: must be more than 0, got inf"),
        (["--dropout", "1"], "argument --dropout: must be at least 0 and below 1, got 1"),
        (["--label-smoothing", "-0.1"], "argument --label-smoothing: must be at least 0"),
        (["--epochs", "0"], "argument --epochs: must be at least 1, got 0"),
        (["--model", "resnet5O"], "torchvision has no such classifier; did you mean resnet50"),
        (["--model", "zzzz"], "torchvision.models.list_models()"),
        (["--device", "toaster"], "--device toaster: expected cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "--device cuda:99: PyTorch"),
        (["--device", "cpu", "--precision", "tf32"], "--precision tf32 is a format of NVIDIA GPUs"),
        (["--data", "no/such/folder"], "--data no/such/folder: there is no such directory"),
        (["--weights", "no.pt"], "--weights no.pt: there is no such file"),
        (["--weights", __file__, "--pretrained"], "--weights and --pretrained exclude each other"),
        (["--report", __file__], "cannot be made"),
        (["--recipe", "cake"], "argument --recipe: invalid choice"),
        (["--recip", "origin"], "unrecognized arguments"),
    ],
)
def test_bad_arguments_end_with_code_2_and_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, arguments: list, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        parse(["--report", "out", *arguments])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- models, losses


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("resnet18", "fc"),
        ("squeezenet1_1", "classifier.1"),
        ("mobilenet_v3_small", "classifier.3"),
        ("shufflenet_v2_x0_5", "fc"),
        ("efficientnet_b0", "classifier.1"),
    ],
)
def test_the_head_gets_ten_classes_and_dropout_before_it(tmp_path: Path, name: str, head: str) -> None:
    args = settings(tmp_path, "--model", name, "--freeze-backbone", "--dropout", "0.25")
    model, origin = models.build_model(args, 10, print)
    assert origin == "random"
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert 0.25 in [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 and all(name.startswith(head) for name in trained)


def test_the_cifar_stem_and_another_activation(tmp_path: Path) -> None:
    args = settings(tmp_path, "--model", "resnet18", "--stem", "cifar", "--activation", "tanh")
    model, _ = models.build_model(args, 10, print)
    assert model.conv1.weight.shape == (64, 3, 3, 3) and isinstance(model.maxpool, nn.Identity)
    kinds = [type(module) for module in model.modules()]
    assert nn.ReLU not in kinds and kinds.count(nn.Tanh) == 9  # the stem's, and one in each of 8 blocks
    assert model.layer1(model.maxpool(model.conv1(torch.randn(2, 3, 32, 32)))).shape == (2, 64, 32, 32)
    with pytest.raises(UsageError, match="--stem cifar is for ResNets"):
        models.build_model(settings(tmp_path, "--model", "squeezenet1_1", "--stem", "cifar"), 10, print)
    with pytest.raises(UsageError, match="vit_b_32 has no nn.ReLU layers"):
        args = settings(tmp_path, "--model", "vit_b_32", "--activation", "silu", "--image-size", "32")
        models.build_model(args, 10, print)


def test_a_batch_of_one_that_batch_norm_cannot_train_on_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Expected more than 1 value per channel.*--batch-size 2"):
        models.build_model(settings(tmp_path, "--model", "resnet18", "--batch-size", "1"), 10, print)


def test_weight_files_of_ten_and_of_a_thousand_classes(tmp_path: Path) -> None:
    thousand = torchvision.models.resnet18()
    ten, _ = models.build_model(settings(tmp_path, "--model", "resnet18"), 10, print)
    for name, source in (("thousand.pt", thousand), ("ten.pt", ten)):
        torch.save(source.state_dict(), tmp_path / name)
        args = settings(tmp_path, "--model", "resnet18", "--weights", str(tmp_path / name))
        model, origin = models.build_model(args, 10, print)
        assert name in origin and model.fc.out_features == 10
        assert torch.equal(model.layer4[1].conv2.weight, source.layer4[1].conv2.weight)
        assert torch.equal(model.fc.weight, source.fc.weight) == (name == "ten.pt")

    state = thousand.state_dict()
    del state["bn1.weight"]
    torch.save({**state, "stray": torch.zeros(1), "conv1.weight": torch.zeros(1)}, tmp_path / "bad.pt")
    args = settings(tmp_path, "--model", "resnet18", "--weights", str(tmp_path / "bad.pt"))
    with pytest.raises(ProgramError) as error:
        models.build_model(args, 10, print)
    for part in ("missing: bn1.weight", "unknown: stray", r"conv1.weight is [1], expected [64, 3, 7, 7]"):
        assert part in str(error.value)


def test_pretrained_weights_that_cannot_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_args, **_kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", offline)
    with pytest.raises(
        ProgramError, match="--pretrained: the ImageNet weights of resnet18 could not be fetched: .*known"
    ):
        models.build_model(settings(tmp_path, "--model", "resnet18", "--pretrained"), 10, print)
    log: list[str] = []
    args = settings(tmp_path, "--recipe", "origin", "--model", "resnet18")
    _, origin = models.build_model(args, 10, log.append)
    assert origin.startswith("random, because the ImageNet weights") and log[0].startswith("note: ")


def test_losses_against_their_definitions() -> None:
    logits, labels = torch.randn(6, 10), torch.randint(0, 10, (6,))
    target = F.one_hot(labels, 10) * 0.8 + 0.02
    entropy = -(target * target.log()).sum(1).mean()
    kl, mse = models.OneHotLoss("kl", 0.2), models.OneHotLoss("mse", 0.2)
    torch.testing.assert_close(kl(logits, labels), F.cross_entropy(logits, labels, label_smoothing=0.2) - entropy)
    torch.testing.assert_close(models.OneHotLoss("kl", 0.0)(logits, labels), F.cross_entropy(logits, labels))
    torch.testing.assert_close(mse(logits, labels), (logits - target).square().mean())
