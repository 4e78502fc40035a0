"""The Triton kernel of each operator of ``torch.ops.rkl_triton``. Importing this module imports Triton.

The kernels serve CUDA tensors. With TRITON_INTERPRET=1 in the environment, Triton interprets them on CPU tensors.
"""

from __future__ import annotations

from . import depthwise, separable, trelu

IMPLEMENTATIONS = {
    "trelu": trelu.trelu,
    "trelu_": trelu.trelu_,
    "trelu_backward": trelu.trelu_backward,
    "depthwise_conv2d": depthwise.depthwise_conv2d,
    "depthwise_conv2d_backward": depthwise.depthwise_conv2d_backward,
    "separable_conv2d": separable.separable_conv2d,
    "separable_conv2d_backward": separable.separable_conv2d_backward,
}
