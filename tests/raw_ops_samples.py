"""Arguments of the raw operators torch.ops.fastconv.*, a generator for each: call it with a layout, a dtype and a device."""

from __future__ import annotations

import torch
from cases import lay

ACTS = ("identity", "relu", "silu")
OUTPUT_SAVED = ("relu", "relu6", "leaky_relu", "sigmoid", "tanh")


def image(shape, layout="nhwc", dtype=torch.float32, device="cpu"):
    return lay(torch.randn(shape, device=device).to(dtype), layout)


def vectors(k, dtype, device):
    """weight, bias, running_mean, running_var, num_batches_tracked of a batch norm."""
    return (
        torch.rand(k, device=device).to(dtype) + 0.5,
        torch.randn(k, device=device).to(dtype),
        torch.randn(k, device=device).to(dtype),
        torch.rand(k, device=device).to(dtype) + 0.5,
        torch.tensor(3, device=device),
    )


def conv2d_bias_act(layout, dtype, device):
    x, w = image((2, 4, 6, 5), layout, dtype, device), image((6, 4, 3, 3), "nhwc", dtype, device)
    b, r = torch.randn(6, device=device).to(dtype), image((2, 6, 6, 5), layout, dtype, device)
    for act in ACTS:
        yield (x, w, b, r, [1, 1], [1, 1], [1, 1], 1, act, act == "silu")
    yield (x, w, None, None, [2, 1], [0, 2], [1, 2], 1, "gelu", True)
    yield (x, image((6, 2, 1, 1), "nchw", dtype, device), b, None, [2, 2], [0, 0], [1, 1], 2, "relu", False)
    yield (x[:0], w, b, r[:0], [1, 1], [1, 1], [1, 1], 1, "silu", True)
    yield (image((3, 4, 1, 1), layout, dtype, device), w, None, None, [1, 1], [1, 1], [1, 1], 1, "relu", False)
    yield (image((2, 1, 6, 5), layout, dtype, device), image((1, 1, 3, 3), "nchw", dtype, device), None, None,
           [1, 1], [1, 1], [1, 1], 1, "relu", False)  # fmt: skip


def conv2d_backward(layout, dtype, device):
    x, w = image((2, 4, 6, 5), layout, dtype, device), image((6, 4, 3, 3), "nchw", dtype, device)
    g = image((2, 6, 6, 5), layout, dtype, device)
    for mask in ([True, True], [True, False], [False, True]):
        yield (g, x, w, [1, 1], [1, 1], [1, 1], 1, mask)
    yield (image((2, 8, 3, 3), layout, dtype, device), x, image((8, 2, 2, 1), "nhwc", dtype, device), [2, 2], [0, 0],
           [1, 1], 2, [True, True])  # fmt: skip
    yield (g[:0], x[:0], w, [1, 1], [1, 1], [1, 1], 1, [True, True])


def act_bias_backward(layout, dtype, device):
    g, saved = image((2, 5, 4, 3), layout, dtype, device), image((2, 5, 4, 3), layout, dtype, device)
    for act in (*OUTPUT_SAVED, "silu", "gelu", "hardswish"):
        yield (g, saved, act, [True, True])
        yield (g, saved, act, [True, False])
    yield (g, lay(saved, "nchw"), "relu", [True, True])
    yield (g, None, "identity", [False, True])
    yield (g[:0], saved[:0], "relu", [True, True])


def batch_norm_act(layout, dtype, device):
    x, r = image((3, 5, 4, 3), layout, dtype, device), image((3, 5, 4, 3), "nchw", dtype, device)
    w, b, mean, var, count = vectors(5, torch.float32 if dtype is not torch.float64 else dtype, device)
    for training in (True, False):
        yield (x, r, w, b, mean, var, count, training, 0.1, 1e-5, "relu")
        yield (x, None, None, None, mean, var, None, training, 0.1, 1e-5, "silu")
    yield (x, None, w, None, mean, var, count, True, None, 1e-5, "identity")
    yield (x, None, None, None, None, None, None, True, 0.1, 1e-5, "relu")


def batch_norm_act_backward(layout, dtype, device):
    x, g, y, r = (image((3, 5, 4, 3), layout, dtype, device) for _ in range(4))
    acc = torch.float64 if dtype is torch.float64 else torch.float32
    w, b, mean, invstd, _ = vectors(5, acc, device)
    for training in (True, False):
        yield (g, x, y, None, w, None, mean, invstd, training, "relu", [True, True, True, True])
        yield (g, x, None, r, w, b, mean, invstd, training, "silu", [True, True, True, True])
        yield (g, x, None, None, None, None, mean, invstd, training, "identity", [True, False, False, False])
    yield (g, x, y, None, w, None, mean, invstd, True, "tanh", [False, True, False, True])
    yield (lay(g, "nchw"), x, None, None, w, b, mean, invstd, True, "gelu", [True, False, True, False])


def conv2d_bn_act(layout, dtype, device):
    x, w = image((2, 4, 6, 5), layout, dtype, device), image((6, 4, 3, 3), "nchw", dtype, device)
    r, cb = image((2, 6, 6, 5), layout, dtype, device), torch.randn(6, device=device).to(dtype)
    g, b, mean, var, count = vectors(6, torch.float64 if dtype is torch.float64 else torch.float32, device)
    for training in (True, False):
        for save in (True, False):
            yield (x, w, cb, r, g, b, mean, var, count, [1, 1], [1, 1], [1, 1], 1, training, 0.1, 1e-5, "relu", save)
            yield (
                x,
                w,
                None,
                None,
                None,
                None,
                mean,
                var,
                None,
                [2, 2],
                [1, 1],
                [1, 1],
                1,
                training,
                0.1,
                1e-5,
                "silu",
                save,
            )
    yield (x, w, None, None, g, b, None, None, None, [1, 1], [1, 1], [1, 1], 1, True, None, 1e-5, "relu", True)


def max_pool2d(layout, dtype, device):
    x = image((2, 5, 7, 6), layout, dtype, device)
    for save in (True, False):
        yield (x, [3, 3], [2, 2], [1, 1], [1, 1], False, save)
        yield (x, [3, 2], [2, 3], [0, 1], [2, 1], True, save)
    yield (x[:0], [3, 3], [2, 2], [1, 1], [1, 1], False, True)
    yield (image((2, 1, 1, 1), layout, dtype, device), [1, 1], [1, 1], [0, 0], [1, 1], False, True)


def max_pool2d_backward(layout, dtype, device):
    g = image((2, 5, 4, 3), layout, dtype, device)
    offsets = torch.randint(9, (2, 5, 4, 3), device=device, dtype=torch.uint8)
    offsets[:, :, [0, -1]], offsets[..., [0, -1]] = 4, 4  # at the border: the tap that lies inside the input
    offsets = lay(offsets, layout)
    yield (g, offsets, [7, 6], [3, 3], [2, 2], [1, 1], [1, 1], True)
    yield (lay(g, "nchw"), offsets, [7, 6], [3, 3], [2, 2], [1, 1], [1, 1], False)
    yield (g[:0], offsets[:0], [7, 6], [3, 3], [2, 2], [1, 1], [1, 1], True)


def avg_pool2d(layout, dtype, device):
    x = image((2, 5, 7, 6), layout, dtype, device)
    yield (x, [3, 3], [2, 2], [1, 1], False, True, None)
    yield (x, [3, 2], [2, 3], [1, 1], True, False, None)
    yield (x, [2, 2], [2, 2], [0, 0], True, True, 3)
    yield (x[:0], [3, 3], [2, 2], [1, 1], False, True, None)


def avg_pool2d_backward(layout, dtype, device):
    g = image((2, 5, 4, 3), layout, dtype, device)
    yield (g, [7, 6], [3, 3], [2, 2], [1, 1], False, True, None, True)
    yield (g, [7, 6], [3, 3], [2, 2], [1, 1], False, False, 5, False)
    yield (g[:0], [7, 6], [3, 3], [2, 2], [1, 1], False, True, None, True)


def adaptive_avg_pool2d(layout, dtype, device):
    x = image((2, 5, 7, 6), layout, dtype, device)
    for size in ([1, 1], [3, 2], [9, 8]):
        yield (x, size)
    yield (x[:0], [2, 2])


def adaptive_avg_pool2d_backward(layout, dtype, device):
    yield (image((2, 5, 1, 1), layout, dtype, device), [7, 6], True)
    yield (image((2, 5, 3, 4), layout, dtype, device), [7, 6], True)
    yield (image((0, 5, 3, 4), layout, dtype, device), [7, 6], False)


def losses(layout, dtype, device):
    x = image((3, 5, 4, 2), layout, dtype, device)
    w = torch.rand(5, device=device).to(dtype)
    yield x, torch.randint(5, (3, 4, 2), device=device), w
    yield x, x.detach().softmax(1), w
    yield torch.randn(7, 5, device=device).to(dtype), torch.randint(5, (7,), device=device), None


def cross_entropy(layout, dtype, device):
    for x, t, w in losses(layout, dtype, device):
        for reduction in (0, 1, 2):
            yield (x, t, w, reduction, -100, 0.1)


def cross_entropy_backward(layout, dtype, device):
    for x, t, w in losses(layout, dtype, device):
        for reduction in (0, 1, 2):
            loss, lse, normalizer = torch.ops.fastconv.cross_entropy(x, t, w, reduction, -100, 0.1)
            yield (
                torch.randn_like(loss),
                x,
                t,
                w,
                lse,
                normalizer,
                reduction,
                -100,
                0.1,
                [True, t.is_floating_point()],
            )


SAMPLES = {
    f.__name__: f
    for f in (
        conv2d_bias_act, conv2d_backward, act_bias_backward, batch_norm_act, batch_norm_act_backward, conv2d_bn_act,
        max_pool2d, max_pool2d_backward, avg_pool2d, avg_pool2d_backward, adaptive_avg_pool2d,
        adaptive_avg_pool2d_backward, cross_entropy, cross_entropy_backward,
    )
}  # fmt: skip
