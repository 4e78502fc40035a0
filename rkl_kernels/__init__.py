"""Fused T-ReLU, depthwise and separable convolution for PyTorch: operators and drop-in layers.

Equation numbers are those of Wang, Tian and Shen, "A Self-Distillation Assisted ResNet-KL Image Classification Network"
(2023). Examples in docstrings run as tests; they take ``torch``, ``torch.nn`` as ``nn`` and this package as ``rk``.
"""

from . import reference
from ._backends import Status, backends, use_backend
from ._convert import Conversion, convert, restore
from ._trelu import trelu
from .depthwise import depthwise_conv2d
from .inference import Fusion, fuse_for_inference
from .layers import DepthwiseConv2d, SeparableConv2d, TReLU
from .planner import Explanation, explain
from .separable import separable_conv2d

__version__ = "0.1.0"

__all__ = [
    "Conversion",
    "DepthwiseConv2d",
    "Explanation",
    "Fusion",
    "SeparableConv2d",
    "Status",
    "TReLU",
    "backends",
    "convert",
    "depthwise_conv2d",
    "explain",
    "fuse_for_inference",
    "reference",
    "restore",
    "separable_conv2d",
    "trelu",
    "use_backend",
]
