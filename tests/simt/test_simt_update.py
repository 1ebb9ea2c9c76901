"""The optimizer's kernel in the emulator, against its formulas in fp64."""

import ctypes
import math

import pytest
import simt_lib
import torch
from simt_lib import DTYPES, guarded, library, pointer

pytestmark = pytest.mark.skipif(simt_lib.missing() is not None, reason=str(simt_lib.missing()))

RULES = ["plain", "momentum", "nesterov", "adam"]
ALL_LIVE = 2**64 - 1
CHUNK = 4096  # elements of a block


class UpdateTensor(ctypes.Structure):
    _fields_ = [(f, ctypes.c_void_p) for f in ("w", "m", "v", "half", "g")]
    _fields_ += [
        ("elements", ctypes.c_int64),
        ("live", ctypes.c_uint64),
        ("inner", ctypes.c_int),
        ("taps", ctypes.c_int),
        ("splits", ctypes.c_int),
    ]
    _fields_ += [("grad_dtype", ctypes.c_int8), ("half_dtype", ctypes.c_int8), ("vec", ctypes.c_bool)]


HYPER = {
    "plain": [0.1, 0.0, 0.01, 0.0],
    "momentum": [0.1, 0.9, 0.01, 0.0],
    "nesterov": [0.1, 0.9, 0.01, 1.0],
    "adam": [0.02, 0.9, 0.99, math.sqrt(0.3), 1e-3, 0.98, 0.05],
}


def formula(rule: str, w, m, v, g):
    """The new w, m and v, in fp64."""
    w, m, v, g = (t.double() for t in (w, m, v, g))
    h = HYPER[rule]
    if rule == "adam":
        rate, beta1, beta2, root, eps, keep, l2 = h
        d = g + l2 * w
        m, v = m + (1 - beta1) * (d - m), beta2 * v + (1 - beta2) * d * d
        return keep * w - rate * m / (v.sqrt() / root + eps), m, v
    lr, momentum, decay, nesterov = h
    d = g + decay * w
    if rule == "plain":
        return w - lr * d, m, v
    m = momentum * m + d
    return w - lr * (d + momentum * m if nesterov else m), m, v


def run(rule: str, problems: list[dict], seed: int = 0) -> None:
    """One call; each problem's tensors end where mapped memory ends, and are overwritten."""
    table = (UpdateTensor * len(problems))()
    for entry, p in zip(table, problems, strict=True):
        entry.w, entry.g, entry.half = pointer(p["w"]), pointer(p["g"]), pointer(p["half"])
        entry.m = pointer(p["m"]) if rule != "plain" else None
        entry.v = pointer(p["v"]) if rule == "adam" else None
        entry.splits = p.get("splits", 1)
        entry.elements, entry.live, entry.inner, entry.taps = p["w"].numel(), p["live"], p["inner"], p["taps"]
        entry.grad_dtype = DTYPES[p["g"].dtype]
        entry.half_dtype = 0 if p["half"] is None else DTYPES[p["half"].dtype]
    hyper = torch.tensor(HYPER[rule], dtype=torch.float64)
    number = {"plain": 0, "adam": 2}.get(rule, 1)
    library("update").call("simt_update", number, ctypes.c_void_p(hyper.data_ptr()), table, len(problems), seed=seed)


def problem(count: int, grad: torch.dtype, half: torch.dtype | None, generator, live=ALL_LIVE, inner=1, taps=1) -> dict:
    w, m, v, g = torch.randn(4, count, generator=generator)
    parts = {"w": w, "m": m, "v": v.abs(), "g": g.to(grad)}
    parts = {key: guarded(t) if count else t for key, t in parts.items()}
    copy = None if half is None else guarded(torch.full((count,), float("nan"), dtype=half)) if count else None
    return {**parts, "half": copy, "live": live, "inner": inner, "taps": taps}


def check(rule: str, problems: list[dict], seed: int = 0) -> None:
    before = [{k: v.clone() if torch.is_tensor(v) else v for k, v in p.items()} for p in problems]
    run(rule, problems, seed)
    for p, old in zip(problems, before, strict=True):
        w, m, v = formula(rule, old["w"], old["m"], old["v"], old["g"].view(p.get("splits", 1), -1).double().sum(0))
        index = torch.arange(p["w"].numel())
        tap = index // p["inner"] % p["taps"]
        live = torch.tensor([p["live"] >> t & 1 for t in range(p["taps"])], dtype=torch.bool)[tap]
        expected = [("w", w)] + [("m", m)] * (rule != "plain") + [("v", v)] * (rule == "adam")
        for name, value in expected:
            torch.testing.assert_close(
                p[name].double(), torch.where(live, value, old[name].double()), rtol=2e-6, atol=2e-6
            )
        for name in {"m", "v"} - {name for name, _ in expected}:
            assert torch.equal(p[name], old[name])
        if p["half"] is not None:
            assert torch.equal(p["half"][live], p["w"][live].to(p["half"].dtype)) and p["half"][~live].isnan().all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", (0, 3))
def test_sizes_dtypes_and_copies(rule, seed):
    """Ends inside a vector, a chunk and a block, tensors of no element, every pair of dtypes, in one launch."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [1, 0, 3, 4, 255, 1024, CHUNK - 4, CHUNK, CHUNK + 1, 2 * CHUNK + 1023]
    grads, halves = list(DTYPES), [None, torch.bfloat16, torch.float16]
    check(rule, [problem(n, grads[i % 3], halves[i // 3 % 3], generator) for i, n in enumerate(sizes)], seed)


@pytest.mark.parametrize("grad", DTYPES, ids=str)
@pytest.mark.parametrize(
    "inner,taps,live", [(8, 9, 0b000010000), (4, 4, 0b0110), (6, 9, 0b101010101), (1, 49, 1 << 48), (3, 63, 1 << 62)]
)
def test_taps(inner, taps, live, grad):
    """Whole vectors of one tap, vectors that would cross into the next, and the highest tap."""
    generator = torch.Generator().manual_seed(1)
    check("momentum", [problem(8 * inner * taps, grad, torch.bfloat16, generator, live, inner, taps)])


@pytest.mark.parametrize("splits", (2, 5))
@pytest.mark.parametrize("count", (64, 1023, CHUNK + 8))
def test_gradients_as_split_sums(count, splits):
    """With sums that lie on 16 bytes and sums that do not, beside tensors without; taps too."""
    generator = torch.Generator().manual_seed(count)
    parts = problem(count, torch.float32, torch.bfloat16, generator)
    parts |= {"g": guarded(torch.randn(splits * count, generator=generator)), "splits": splits}
    masked = problem(36, torch.float32, None, generator, 0b101, 4, 3)
    masked |= {"g": guarded(torch.randn(splits * 36, generator=generator)), "splits": splits}
    # every tensor on 16 bytes, which the second sum of 1023 is not
    aligned = {**parts, **{key: parts[key].clone() for key in ("w", "m", "v", "g")}, "half": None}
    check("momentum", [problem(7, torch.bfloat16, None, generator), parts, masked, aligned])


def test_more_tensors_than_a_table_holds():
    generator = torch.Generator().manual_seed(2)
    check("momentum", [problem(1 + i % 7, torch.bfloat16, None, generator) for i in range(300)])


@pytest.mark.parametrize("count", (1, 5, 1023, CHUNK + 2))
def test_what_lies_behind_an_aligned_tensor_stays(count):
    """Its last elements do not fill a vector."""
    generator = torch.Generator().manual_seed(4)
    padded = {key: torch.randn(count + 8, generator=generator) for key in ("w", "m", "v", "g")}
    padded["half"] = torch.zeros(count + 8, dtype=torch.bfloat16)
    behind = {key: t[count:].clone() for key, t in padded.items()}
    check("momentum", [{**{key: t[:count] for key, t in padded.items()}, "live": ALL_LIVE, "inner": 1, "taps": 1}])
    assert all(torch.equal(padded[key][count:], t) for key, t in behind.items())


@pytest.mark.parametrize("odd", ("w", "m", "v", "g", "half"))
def test_one_unaligned_tensor(odd):
    """The emulator refuses a vector access that a GPU would fault on."""
    generator = torch.Generator().manual_seed(5)
    held = {key: torch.randn(1025, generator=generator).abs() for key in ("w", "m", "v", "g")}
    held["half"] = torch.zeros(1025, dtype=torch.bfloat16)
    parts = {key: t[1:] if key == odd else t[:1024] for key, t in held.items()}
    check("adam", [{**parts, "live": ALL_LIVE, "inner": 1, "taps": 1}])


def test_nothing():
    run("momentum", [])
    run("adam", [problem(0, torch.float32, None, torch.Generator())])
