"""Fused models under DistributedDataParallel and fully_shard: four gloo processes, everything as with the stock model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fuse_models import Net
from fuse_util import image
from torch import nn

import fastconv

CASES = (
    "ddp 4",
    "ddp 2",
    "static_graph",
    "find_unused_parameters",
    "small buckets",
    "compiled ddp",
    "fsdp2",
    "sync batch norm",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> str:
    """What the first rank printed; the processes start once for all cases."""
    file, here = tmp_path_factory.mktemp("ranks") / "store", Path(__file__).parent
    command = [sys.executable, str(here / "distributed_worker.py")]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), "4", str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=here
        )
        for rank in range(4)
    ]
    try:
        texts = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    wrong = [text[1] for text, rank in zip(texts, ranks, strict=True) if rank.returncode != 0]
    return texts[0][0] if not wrong else "failed\n" + "\n".join(wrong)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch.distributed has no gloo here")
@pytest.mark.parametrize("case", CASES)
def test_ranks_train_as_with_the_stock_model(case, finished):
    """Outputs, gradients, parameters and running statistics of three steps, on every rank."""
    assert f"{case}: " in finished and not finished.startswith("failed"), finished


@pytest.mark.parametrize("order", ("converted, then fused", "fused, then converted"))
def test_sync_batch_norm_before_and_after(order):
    """As the stock model with the same conversion; several processes need a GPU for it, see the case "sync batch norm"."""
    torch.manual_seed(0)
    stock, model = Net().double(), Net().double()
    model.load_state_dict(stock.state_dict())
    convert = nn.SyncBatchNorm.convert_sync_batchnorm
    stock = convert(stock)
    model = fastconv.fuse(convert(model)) if order.startswith("converted") else convert(fastconv.fuse(model))
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in model.modules()) == 9
    x = image(3, 3, 9, 8)
    torch.testing.assert_close(model.eval()(x), stock.eval()(x), rtol=1e-9, atol=1e-9)
    for p, q in zip(model.buffers(), stock.buffers(), strict=True):
        assert torch.equal(p, q)
    # One process: nothing to synchronise, it trains as plain batch norm does.
    out, wanted = model.train()(x), stock.train()(x)
    torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-9)
    out.square().sum().backward()
    wanted.square().sum().backward()
    for p, q in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-9)
    for p, q in zip(model.buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)
