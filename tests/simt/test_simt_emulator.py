"""The emulator itself: fragment layouts, and that each kind of fault is seen."""

import ctypes
import random
import re

import pytest
import simt_lib
import torch
from simt_lib import KERNELS, library, pointer

pytestmark = pytest.mark.skipif(simt_lib.missing() is not None, reason=str(simt_lib.missing()))


def ptr(t):
    return ctypes.c_void_p(pointer(t))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_mma_layout(dtype):
    generator = torch.Generator().manual_seed(0)
    k = 8 if dtype == torch.float32 else 16
    a, b = (torch.randint(-4, 5, s, generator=generator).to(dtype) for s in ((16, k), (k, 8)))
    d = torch.full((16, 8), float("nan"))
    for seed in range(3):
        library("emulator").call("simt_mma", simt_lib.DTYPES[dtype], ptr(a), ptr(b), ptr(d), seed=seed)
        assert torch.equal(d, a.float() @ b.float())


def test_ldmatrix_layout_and_conflicts():
    lib = library("emulator")
    tiles = torch.arange(256, dtype=torch.int16).view(4, 8, 8)
    lane = torch.arange(32)
    for trans in (0, 1):
        want = torch.empty(32, 4, 2, dtype=torch.int16)
        for tile in range(4):
            for e in range(2):
                row, col = (lane // 4, lane % 4 * 2 + e) if not trans else (lane % 4 * 2 + e, lane // 4)
                want[:, tile, e] = tiles[tile, row, col]
        out = torch.zeros(32, 8, dtype=torch.int16)
        lib.call("simt_ldmatrix", ptr(tiles), ptr(out), trans, 8)
        assert torch.equal(out.view(32, 4, 2), want)
        assert lib.counters["ldmatrix_conflicts"] == 0
        lib.call("simt_ldmatrix", ptr(tiles), ptr(out), trans, 64)  # rows 128 bytes apart: 8 rows in the same banks
        assert torch.equal(out.view(32, 4, 2), want)
        assert lib.counters["ldmatrix_conflicts"] == 4 * 7


def fault(number, seed=0):
    data, out = torch.arange(64.0), torch.full((64,), -1.0)
    library("emulator").call("simt_fault", ptr(data), ptr(out), number, seed=seed)
    return torch.equal(out, data.flip(0))


def test_faults_are_seen():
    assert all(fault(0, seed) for seed in range(5))
    assert not any(fault(1, seed) for seed in range(5))
    assert not all(fault(2, seed) for seed in range(5))
    for number, message in (
        (3, "misaligned global address"),
        (4, "divergent barrier.*fragment_kernels.cuh:[0-9]+ and at"),
        (5, "exited"),
        (6, "divergent warp"),
    ):
        with pytest.raises(RuntimeError, match=message):
            fault(number)
        assert fault(0)  # the next launch is sound again


def test_fast_division():
    lib = library("emulator").lib
    rng = random.Random(0)
    values = [0, 1, 2, 3, 7, 63, 64, 65, 2**16, 2**30, 2**31 - 1]
    pairs = [(n, d) for n in values for d in values if d] + [
        (rng.randrange(2**31), rng.randrange(1, 2**31)) for _ in range(2000)
    ]
    pairs += [(rng.randrange(2**31), rng.randrange(1, 300)) for _ in range(2000)]
    for n, d in pairs:
        assert lib.simt_fastdiv(n, d) == n // d, (n, d)
        q, r = ctypes.c_int(), ctypes.c_int()
        if n * d < 2**32:
            lib.simt_smalldiv(n, d, ctypes.byref(q), ctypes.byref(r))
            assert (q.value, r.value) == divmod(n, d), (n, d)
        q = ctypes.c_int64()
        for rows in (n, n * 2**20 + n):  # in 32 bits, and past them
            lib.simt_divide_rows(ctypes.c_int64(rows), d, ctypes.byref(q), ctypes.byref(r))
            assert (q.value, r.value) == divmod(rows, d), (rows, d)


def test_activation_names():
    lib = library("emulator").lib
    for i, name in enumerate(simt_lib.ACTIVATIONS):
        assert lib.simt_activation(name.encode()) == i
    assert lib.simt_activation(b"softplus") == len(simt_lib.ACTIVATIONS)


def test_kernels_are_torch_free_and_keep_ptx_in_one_place():
    for path in KERNELS.glob("*.cuh"):
        text = path.read_text()
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)", text), path.name
        if path.name != "ptx.cuh":
            assert "asm" not in re.sub(r"//.*", "", text).replace("asm(R", ""), path.name
        assert len(text.splitlines()) <= 350, path.name
