"""Train a converted ShuffleNet to give the same logits as a ResNet (logit distillation).

    python examples/distill_torchvision.py

The teacher's weights and the images are random, so nothing is downloaded. Replace them with your own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

import rkl_kernels as rk


def distance(answers: Tensor, wanted: Tensor, temperature: float = 2.0) -> Tensor:
    """Kullback-Leibler divergence of two sets of logits at temperature T. The factor T^2 keeps the gradients from
    shrinking with T."""
    log_p, log_q = (F.log_softmax(logits / temperature, 1) for logits in (answers, wanted))
    return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean") * temperature**2


def main(steps: int = 30) -> tuple[float, float]:
    torch.manual_seed(0)
    teacher = torchvision.models.resnet18(num_classes=10).eval().requires_grad_(False)
    student = torchvision.models.shufflenet_v2_x0_5(num_classes=10)
    print(rk.convert(student))
    images = torch.randn(64, 3, 32, 32)
    wanted = teacher(images)
    wanted = 4 * (wanted - wanted.mean(0)) / wanted.std()  # a random teacher gives all images nearly the same logits
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        loss = distance(student(images), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    print(f"distance to the teacher: {losses[0]:.3f} before, {losses[-1]:.3f} after {steps} steps")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
