"""DTensor: the separable backward sharded along the batch, or not at all. The other operators are taken apart into
PyTorch's own (decompositions.py), whose rules DTensor has."""

from __future__ import annotations

from typing import Any


def register(packets: Any) -> None:
    """Tell ``torch.distributed.tensor``, which must be imported, of a namespace's operators."""
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
