"""Swap the depthwise layers of a torchvision model, train it, swap the layers back, and fuse it for inference.

    python examples/convert_and_finetune.py

The images are generated: vertical or horizontal stripes. The weights start at random, so nothing is downloaded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

import rkl_kernels as rk


def gratings(count: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """Images (count, 3, size, size) of noisy stripes with random periods, and labels: 1 for horizontal, 0 for vertical
    stripes."""
    labels = torch.randint(2, (count,))
    stripes = (
        torch.sin(torch.arange(size) * (0.5 + torch.rand(count, 1))).expand(3, size, count, size).permute(2, 0, 1, 3)
    )
    images = torch.where(labels[:, None, None, None] == 1, stripes.transpose(2, 3), stripes)
    return images + 0.5 * torch.randn_like(images), labels


def main(steps: int = 50) -> float:
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v2(num_classes=2, width_mult=0.35).to(memory_format=torch.channels_last)
    print(rk.convert(model))  # the optimizer may be created before or after: the parameters stay the same objects
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for step in range(steps):
        images, labels = gratings(32)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step}: loss {float(loss.detach()):.3f}")
    rk.restore(model)  # only the classes change back; torch.save(model.state_dict()) does not need this

    fused = rk.fuse_for_inference(model)  # a copy; the model itself can be trained further
    print(fused.fusion_report)
    images, labels = gratings(256)
    with torch.no_grad():
        correct = (fused(images).argmax(1) == labels).float().mean().item()
    print(f"correct: {correct:.1%}")
    return correct


if __name__ == "__main__":
    main()
