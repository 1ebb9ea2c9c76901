"""fastconv: fused convolution, batch-norm, pooling and cross-entropy kernels for PyTorch.

    model = fastconv.fuse(model)                                     # any CNN that torch.fx can trace, one line
    step = fastconv.TrainStep(model, fnn.CrossEntropyLoss(), opt)    # forward, backward, optimizer as one call

``fastconv.functional`` (FF) has the operators, ``fastconv.nn`` (fnn) the layers, ``python -m fastconv info`` tells what
runs here, ``fastconv.explain`` which backend a call takes.
"""

from . import functional, nn, tune
from ._plan import programs as _programs  # noqa: F401  (fused models ask it)
from ._version import __version__
from .explain import explain
from .fuse import fuse, fusion_report, unfuse
from .inference import optimize_for_inference
from .ops import backends, use_backend
from .train import TrainStep

__all__ = [
    "TrainStep",
    "__version__",
    "backends",
    "explain",
    "functional",
    "fuse",
    "fusion_report",
    "nn",
    "optimize_for_inference",
    "tune",
    "unfuse",
    "use_backend",
]
