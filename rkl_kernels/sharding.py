"""DTensor's sharding rule for the separable backward: shard the batch, or nothing. The other operators need no rule:
DTensor decomposes them into PyTorch's own (decompositions.py), for which it has rules."""

from __future__ import annotations

from typing import Any


def register(packets: Any) -> None:
    """Register a namespace's rule with ``torch.distributed.tensor``, which must already be imported."""
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    def rule(grad: Any, y: Any, x: Any, depthwise: Any, pointwise: Any, bias: Any, *settings: Any) -> list[Any]:
        tensors, others = (grad, y, x, depthwise, pointwise, bias), [None] * len(settings)
        shard, whole = Shard(0), Replicate()
        split = [None if t is None else p for t, p in zip(tensors, [shard] * 3 + [whole] * 3, strict=True)]
        each = [None if t is None else whole for t in tensors]
        of_image = shard if settings[-1][0] else whole
        return [([whole] * 5, each + others), ([of_image] + [Partial()] * 4, split + others)]

    declare: Any = register_sharding(packets.separable_conv2d_backward.default)
    declare(rule)
