"""The Triton kernels, by the operator of ``torch.ops.rkl_triton`` that each makes. Importing this imports Triton.

They serve CUDA tensors; with TRITON_INTERPRET=1 in the environment, CPU tensors through Triton's interpreter.
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
