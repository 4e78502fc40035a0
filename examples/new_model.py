"""Build a model from this package's layers and train it.

python examples/new_model.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from convert_and_finetune import gratings
from torch import nn

import rkl_kernels as rk


def block(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    """Depthwise and pointwise convolution in one operator, then batch norm and T-ReLU."""
    separable = rk.SeparableConv2d(c_in, c_out, 3, stride, padding=1, bias=False, padding_mode="reflect")
    return nn.Sequential(separable, nn.BatchNorm2d(c_out), rk.TReLU(inplace=True))


def build() -> nn.Sequential:
    first = rk.DepthwiseConv2d(3, 5, stride=2, padding=2, multiplier=4)  # 3 channels to 12
    blocks = block(12, 16, 1), block(16, 32, 2), block(32, 32, 1)
    return nn.Sequential(first, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2))


def main(steps: int = 60) -> float:
    torch.manual_seed(0)
    model = build().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        images, labels = gratings(32)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images, labels = gratings(256)
    with torch.inference_mode():
        correct = (model.eval()(images).argmax(1) == labels).float().mean().item()
    print(f"correct: {correct:.1%}")
    return correct


if __name__ == "__main__":
    main()
