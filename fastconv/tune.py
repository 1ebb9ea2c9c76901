"""Measures a model's calls ahead of their first use: ``python -m fastconv tune --model resnet50 --batch-size 128``.

A tuning run makes one training step and one inference step of the fused model, collects the distinct calls in them,
measures every backend of each (ops/measure.py), and keeps the times in the cache (fastconv/_cache.py). For a model of
your own, run it inside :func:`measuring`.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from .fuse import fuse
from .ops import choice, keys, registry
from .ops.measure import Result

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Tuning:
    """What a tuning run saw and measured."""

    calls: Counter[str] = field(default_factory=Counter)  # class of calls -> how often it was called
    names: dict[str, Sequence[str]] = field(default_factory=dict)  # class -> backends that can run it
    results: dict[str, Result] = field(default_factory=dict)  # class -> times that this run measured
    seconds: float = 0.0

    def rows(self, device: torch.device) -> list[tuple[str, int, dict[str, list[float]], str]]:
        """(class, calls, milliseconds by backend, winner) of every class with a measurement, new or kept."""
        store, found = choice.store_of(device), []
        for call, count in self.calls.items():
            entry = store.get(call)
            if entry is not None and entry["ms"]:
                ms = {name: entry["ms"][name] for name in self.names[call] if name in entry["ms"]}
                found.append((call, count, ms, choice.winner(ms)))
        return found

    def table(self, device: torch.device) -> str:
        """The winners as a Markdown table: milliseconds of forward + backward by backend, and sums over all calls."""
        rows = self.rows(device)
        if not rows:
            return "nothing was measured: no call could run on more than one backend"
        backends = [name for name in registry.NAMES if any(name in ms for _, _, ms, _ in rows)]
        lines = [
            f"| calls | class of calls | {' | '.join(f'{b} ms' for b in backends)} | winner | aten / winner |",
            f"|---:|---|{'---:|' * len(backends)}---|---:|",
        ]
        total: Counter[str] = Counter()
        for call, count, ms, best in rows:
            cells = [" + ".join(f"{t:.3f}" for t in ms[b]) if b in ms else "-" for b in backends]
            gain = f"{sum(ms['aten']) / sum(ms[best]):.2f}" if "aten" in ms else "-"
            lines.append(f"| {count} | {keys.short(call)} | {' | '.join(cells)} | {best} | {gain} |")
            order = next(b for b in backends if b in ms)
            for name, used in (("aten", "aten"), ("the fixed order", order), ("the fastest", best)):
                total[name] += count * sum(ms[used])
        wins = Counter(best for *_, best in rows)
        won = ", ".join(f"{name} {wins[name]}" for name in backends if wins[name])
        sums = ", ".join(f"{name} {ms:.1f} ms" for name, ms in total.items())
        lines += ["", f"Winners of {len(rows)} classes: {won}. All calls together: {sums}."]
        took = sum(r.seconds for r in self.results.values())
        if self.results:
            each = 1e3 * took / len(self.results)
            lines.append(f"Measured now: {len(self.results)} classes in {took:.1f} s ({each:.0f} ms each).")
        return "\n".join(lines)


@contextlib.contextmanager
def _policy(tuning: Tuning, measure: bool, again: bool, seconds: float | None, done=None) -> Iterator[None]:
    def visit(op: str, call: str, names: Sequence[str]) -> None:
        if not measure:
            tuning.calls[call] += 1
        tuning.names[call] = names

    def note(call: str, result: Result) -> None:
        tuning.results[call] = result
        if done is not None:
            done()

    before = choice.set_policy(choice.Policy(measure, visit, note, again, seconds))
    try:
        yield
    finally:
        choice.set_policy(before)


@contextlib.contextmanager
def measuring(*, again: bool = False, seconds: float | None = None) -> Iterator[Tuning]:
    """Inside, every call that "auto" decides and that has no measurement gets one, on CPUs too; so does a convolution
    that Triton can run and that was measured at its first use, without its tiles.

    again: also the calls that have one. seconds: timed rounds per call (default 0.2 on a CPU, 0.05 on a GPU). The
    measurements go to the cache; the yielded :class:`Tuning` holds them too.

    >>> with fastconv.tune.measuring():
    ...     loss_fn(model(x), y).backward()
    """
    tuning = Tuning()
    start = time.perf_counter()
    try:
        with _policy(tuning, True, again, seconds):
            yield tuning
    finally:
        tuning.seconds = time.perf_counter() - start
        tuning.calls.update(dict.fromkeys(tuning.names, 1))


def _steps(model: nn.Module, x: torch.Tensor, y: torch.Tensor, modes: Sequence[str], dtypes: Sequence[str]):
    from .functional import cross_entropy

    for name in dtypes:
        autocast = torch.autocast(x.device.type, dtype=DTYPES[name] or torch.bfloat16, enabled=DTYPES[name] is not None)
        if "train" in modes:
            model.train()
            with autocast:
                loss = cross_entropy(model(x), y)
            loss.backward()
            model.zero_grad(set_to_none=True)
        if "inference" in modes:
            model.eval()
            with autocast, torch.no_grad():
                model(x)


def tune(
    model: nn.Module, input: torch.Tensor, classes: int, *, modes: Sequence[str] = ("train", "inference"),
    dtypes: Sequence[str] = ("fp32",), again: bool = False, seconds: float | None = None, progress=None,
) -> Tuning:  # fmt: skip
    """Measures the calls of one step of ``fuse(model)`` on ``input``: [N, C, H, W] images, ``classes`` logits.

    modes: "train" (forward, cross-entropy, backward) and "inference". dtypes: "fp32", "bf16", "fp16", the latter two
    under autocast. progress(total) -> a callable for each measured class. The model's weights, statistics and gradients
    stay, and so does the random state.

    Returns a :class:`Tuning`; what it measured is in the cache and counts from the next call on.
    """
    fused = fuse(model)
    kept, training = {name: t.clone() for name, t in fused.state_dict().items()}, fused.training
    grads = [(p, p.grad) for p in fused.parameters()]
    fused.zero_grad(set_to_none=True)
    target = torch.arange(input.size(0), device=input.device) % classes
    tuning, start = Tuning(), time.perf_counter()
    try:
        with torch.random.fork_rng([input.device] if input.is_cuda else []):
            with _policy(tuning, False, again, seconds):
                _steps(fused, input, target, modes, dtypes)
            store = choice.store_of(input.device)
            covered = {c: choice.covers(c, store.get(c) or {"ms": {}}, n, True) for c, n in tuning.names.items()}
            missing = [c for c in covered if again or not covered[c]]
            done = progress(len(missing)) if progress is not None else None
            with _policy(tuning, True, again, seconds, done):
                _steps(fused, input, target, modes, dtypes)
    finally:
        fused.train(training)
        fused.load_state_dict(kept)
        for p, grad in grads:
            p.grad = grad
    tuning.seconds = time.perf_counter() - start
    return tuning


def main(options) -> int:
    """``python -m fastconv tune``; ``options`` as fastconv/__main__.py parses them."""
    try:
        import torchvision
    except ImportError as error:
        raise SystemExit(f"tune: --model needs torchvision, which is not installed here ({error})") from None
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("tune: --device cuda expected a CUDA device, torch sees none")
    if not hasattr(torchvision.models, options.model):
        raise SystemExit(f"tune: --model expected a classifier of torchvision.models, got {options.model!r}")
    dtypes = options.dtype or (["bf16"] if device.type == "cuda" else ["fp32"])
    model = getattr(torchvision.models, options.model)(num_classes=options.classes).to(device)
    x = torch.randn(options.batch_size, 3, options.image_size, options.image_size, device=device)
    if options.layout == "channels_last":
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)

    bar = None

    def progress(total: int):
        nonlocal bar
        try:
            from tqdm import tqdm
        except ImportError:
            print(f"measuring {total} classes of calls", flush=True)
            return None
        bar = tqdm(total=total, unit="call", desc="measuring", disable=None)
        return bar.update

    modes = ("train", "inference") if options.mode == "both" else (options.mode,)
    try:
        tuning = tune(
            model, x, options.classes, modes=modes, dtypes=dtypes, again=options.again, seconds=options.seconds,
            progress=progress,
        )  # fmt: skip
    finally:
        if bar is not None:
            bar.close()
    batch = f"batch {options.batch_size}, {options.image_size} px, {', '.join(dtypes)}, {', '.join(modes)}"
    head = f"{options.model}, {batch}, {options.layout}\n\n{choice.store_of(device).environment}"
    text = f"{head}\n\n{tuning.table(device)}\nThe whole run took {tuning.seconds:.1f} s.\n"
    print(text, end="")
    store = choice.store_of(device)
    print(f"Kept in {store.path}" if store.on_disk else "Kept in memory only: the cache cannot be written")
    if options.output:
        with open(options.output, "w") as file:
            file.write(text)
    return 0
