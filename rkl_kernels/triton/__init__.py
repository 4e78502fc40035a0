"""The Triton kernels, registered in the namespace ``torch.ops.rkl_triton``.

They serve CUDA tensors; with TRITON_INTERPRET=1 in the environment, CPU tensors through Triton's interpreter.
"""

from __future__ import annotations

import torch

from . import depthwise, separable, trelu
from .launch import INTERPRETED

_IMPLEMENTATIONS = {
    "trelu": trelu.trelu,
    "trelu_": trelu.trelu_,
    "trelu_backward": trelu.trelu_backward,
    "depthwise_conv2d": depthwise.depthwise_conv2d,
    "depthwise_conv2d_backward": depthwise.depthwise_conv2d_backward,
    "separable_conv2d": separable.separable_conv2d,
    "separable_conv2d_backward": separable.separable_conv2d_backward,
}

DISPATCH_KEY = "CPU" if INTERPRETED else "CUDA"

_library = torch.library.Library("rkl_triton", "IMPL")
for _name, _implementation in _IMPLEMENTATIONS.items():
    _library.impl(_name, _implementation, DISPATCH_KEY)
