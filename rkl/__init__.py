"""ResNet-KL: a thin classifier on ``rkl_kernels`` and its self-distillation trainer."""
