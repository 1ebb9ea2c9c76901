"""Convolution + bias + ReLU and convolution + batch norm + ReLU, forward and forward with backward, shape by shape.

Shapes: every distinct convolution of ResNet50 and VGG16, and the depthwise ones of MobileNetV2. Peers: eager PyTorch in
both layouts (on a GPU with cudnn.benchmark), and on a GPU cuDNN's own fused convolution + bias + ReLU. FLOPs leave out
filter taps over padding; bytes are those of each tensor once: input, weight, output, and in the backward the gradients
beside them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from harness import DTYPES, Bench, Case, add_if_it_runs, arguments, geomean
from shapes import Conv, convolutions

import fastconv
import fastconv.functional as FF


def bias_relu(conv: Conv, dtype: torch.dtype, device: torch.device, backward: bool) -> dict:
    """name -> call; with backward: gradients of input, weight and bias."""
    bias = torch.randn(conv.k, device=device).to(dtype)
    nhwc = conv.tensors(dtype, device)
    nchw = tuple(t.contiguous() for t in nhwc)
    geometry = (conv.stride, conv.padding, 1, conv.groups)

    def stock(x, w, b):
        return F.relu(F.conv2d(x, w, b, *geometry))

    def ours(x, w, b):
        return FF.conv2d_bias_relu(x, w, b, *geometry)

    runs = {"eager nchw": (stock, nchw), "eager nhwc": (stock, nhwc), "fastconv": (ours, nhwc)}
    calls = {name: _call(function, tensors, (bias,), backward) for name, (function, tensors) in runs.items()}
    if device.type == "cuda" and not backward:
        x, w, _ = nhwc
        pair = lambda v: (v, v)  # noqa: E731
        args = (pair(conv.stride), pair(conv.padding), (1, 1), conv.groups)
        # For bf16, or for 3 channels, cuDNN may have no engine.
        fused = lambda: torch.cudnn_convolution_relu(x, w, bias, *args)  # noqa: E731
        add_if_it_runs(calls, "cudnn fused", lambda: fused, f"{conv} {dtype}")
        for name in ("cuda", "triton"):
            if fastconv.backends()[name]:
                calls[name] = _with_backend(name, lambda: ours(x, w, bias))
    return calls


def bn_relu(conv: Conv, dtype: torch.dtype, device: torch.device, backward: bool) -> dict:
    """In training mode; with backward: gradients of input, weight and the batch norm's two parameters."""
    nhwc = conv.tensors(dtype, device)
    nchw = tuple(t.contiguous() for t in nhwc)
    scale, shift = torch.rand(conv.k, device=device) + 0.5, torch.randn(conv.k, device=device)
    mean, var = torch.zeros(conv.k, device=device), torch.ones(conv.k, device=device)

    def stock(x, w, scale, shift):
        y = F.conv2d(x, w, None, conv.stride, conv.padding, 1, conv.groups)
        return F.relu(F.batch_norm(y, mean, var, scale, shift, True))

    def ours(x, w, scale, shift):
        more = {"stride": conv.stride, "padding": conv.padding, "groups": conv.groups, "training": True}
        return FF.conv2d_bn_act(x, w, None, mean, var, scale, shift, **more)

    runs = {"eager nchw": (stock, nchw), "eager nhwc": (stock, nhwc), "fastconv": (ours, nhwc)}
    return {name: _call(function, tensors, (scale, shift), backward) for name, (function, tensors) in runs.items()}


def _call(function, tensors, more, backward: bool):
    x, w, g = tensors
    if not backward:

        def forward():
            with torch.no_grad():
                return function(x, w, *more)

        return forward
    leaves = [t.detach().requires_grad_() for t in (x, w, *more)]

    def both():
        return torch.autograd.grad(function(*leaves), leaves, g)

    return both


def _with_backend(name: str, run):
    def call():
        with torch.no_grad(), fastconv.use_backend(name):
            return run()

    return call


def oracle(op: str, conv: Conv, dtype: torch.dtype, device: torch.device, seed: int) -> torch.Tensor:
    """In fp64, from the same random numbers: the output."""
    torch.manual_seed(seed)
    if op == "bias":
        b = torch.randn(conv.k, device=device).to(dtype).double()
        x, w, _ = (t.double() for t in conv.tensors(dtype, device))
        return F.relu(F.conv2d(x, w, b, conv.stride, conv.padding, 1, conv.groups))
    x, w, _ = (t.double() for t in conv.tensors(dtype, device))
    scale, shift = torch.rand(conv.k, device=device) + 0.5, torch.randn(conv.k, device=device)
    y = F.conv2d(x, w, None, conv.stride, conv.padding, 1, conv.groups)
    return F.relu(F.batch_norm(y, None, None, scale.double(), shift.double(), True))


def main() -> None:
    args = arguments(
        __doc__.split("\n")[0], size={"type": int, "default": 32}, batch={"type": int, "nargs": "*"},
        only={"nargs": "*", "default": [""], "help": "operators, by how their names begin"},
    )  # fmt: skip
    torch.backends.cudnn.benchmark = True
    bench = Bench("conv", args.out, args.device, args.seconds)
    batches = args.batch or ([4, 64] if args.device.type == "cpu" else [4, 128, 512])
    plan = [("conv_bn_relu fwd+bwd", "resnet50", bn_relu, True), ("conv_bias_relu", "vgg16", bias_relu, False)]
    plan += [("conv_bias_relu", "resnet50", bias_relu, False)]
    plan += [("depthwise_bn_relu fwd+bwd", "mobilenet_v2", bn_relu, True)]
    plan += [("depthwise_bias_relu", "mobilenet_v2", bias_relu, False)]
    for op, model, make, backward in plan:
        if not op.startswith(tuple(args.only)):
            continue
        for batch in batches:
            found = list(convolutions(model, batch, args.size).items())
            if op.startswith("depthwise"):
                found = [(conv, count) for conv, count in found if conv.groups == conv.c]
            for conv, count in found[: 2 if args.quick else None]:
                if make is bn_relu and conv.n * conv.p**2 < 2:
                    continue  # one value per channel: batch norm refuses
                for dtype in args.dtype:
                    _measure(bench, op, make, conv, dtype, backward, count, args.device)
    _summary(bench)


def _measure(bench: Bench, op: str, make, conv: Conv, dtype: str, backward: bool, count: int, device) -> None:
    x, w, y = conv.elements
    passes, moved = (3, 3 * x + 3 * w + 4 * y) if backward else (1, x + w + y)
    size = DTYPES[dtype].itemsize
    # The same numbers with the backward and without it: the check is on the forward.
    seed = hash((conv, dtype)) % 2**31
    torch.manual_seed(seed)
    forward = make(conv, DTYPES[dtype], device, False)
    case = Case(op, str(conv), dtype, passes * conv.flops, moved * size, forward, count=count)
    case.check(oracle("bias" if make is bias_relu else "bn", conv, DTYPES[dtype], device, seed))
    if backward:
        torch.manual_seed(seed)
        case.competitors = make(conv, DTYPES[dtype], device, True)
    bench.run(case)


def _summary(bench: Bench) -> None:
    print()
    for op in dict.fromkeys(row.op for row in bench.rows):
        for dtype in dict.fromkeys(row.dtype for row in bench.rows):
            rows = [r for r in bench.rows if r.op == op and r.dtype == dtype and r.competitor == "fastconv"]
            if rows:
                worst = min(rows, key=lambda r: r.speedup)
                mean = geomean(r.speedup for r in rows)
                print(f"{op} {dtype}: geometric mean {mean:.2f} x best peer, worst {worst.speedup:.2f} ({worst.shape})")


if __name__ == "__main__":
    main()
