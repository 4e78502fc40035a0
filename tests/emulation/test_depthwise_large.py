"""The depthwise kernels' index arithmetic on tensors of more than 2^31 elements."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from .conftest import Gpu
from .depthwise_cases import Case, Run, assert_right


class LargeRun(Run):
    """Tensors of more than 2^31 elements, of which only a grid's first and last blocks compute something.

    The tensors are zeros that take no memory until they are touched. Only the last channels of the last image are
    random, or NaN in a result.
    """

    def __init__(self, gpu: Gpu, case: Case, dtype: torch.dtype) -> None:
        super().__init__(gpu, case, dtype)
        # A block of the general kernel has 256 outputs in NCHW.
        gpu.kernels.schedule.first_blocks, gpu.kernels.schedule.last_blocks = 1, 8 if case.nhwc else 256

    def weight_grad(self, weight: bool = True, bias: bool = True) -> tuple[Tensor, Tensor]:
        dw, db = (self.empty(*t.shape, dtype=self.x.dtype) for t in (self.weight, self.bias))
        return self.sums(self.backward(None, dw, db))

    def both_grads(self, bias: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        dx, dw, db = (self.empty(*t.shape, dtype=self.x.dtype) for t in (self.x, self.weight, self.bias))
        return dx, *self.sums(self.backward(dx, dw, db))

    def sums(self, workspace: Tensor) -> tuple[Tensor, Tensor]:
        """Add the sums of the parts here. The second stage spreads the last channels' taps over its whole grid, but
        only a few blocks run."""
        parts = workspace.view(-1, self.weight[0].numel() + 1, self.case.channels)
        sums = parts[..., -64:].sum(0).t()
        return sums[:, :-1].reshape(-1, 1, *self.case.kernel), sums[:, -1]

    def compared(self, x: Tensor) -> Tensor:
        return x[-1:, -64:] if x.dim() == 4 and x.shape[1] > 1 else x[-64:]

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        nhwc = len(shape) == 4 and shape[1] > 1 and self.case.nhwc
        x = self.gpu.empty(*shape, dtype=dtype, nhwc=nhwc, fill=False)
        self.compared(x).fill_(float("nan"))
        return x

    def random(self, *shape: int, dtype: torch.dtype) -> Tensor:
        x = self.empty(*shape, dtype=dtype)
        self.compared(x).normal_()
        return x


MANY = Case(channels=64, size=(32, 32), batch=2**15 + 1)
# Deep rather than many images: a block of the filter's gradient, or of a wide filter, would walk through thousands.
DEEP = Case(channels=2**31 // 25 // 64 * 64 + 128, size=(5, 5), batch=1)
WIDE_AND_DEEP = replace(DEEP, kernel=(1, 9), padding=(0, 4))
# Each of two images fits offsets of 32 bits, but both together do not: two launches.
TWO = replace(DEEP, channels=DEEP.channels // 64 * 2 // 3 * 64, batch=2)
WITH_RESULTS = [
    *(
        (replace(case, nhwc=nhwc), names)
        for nhwc, images in ((True, TWO), (False, MANY))
        for case, names in (
            (images, ("y", "dx")),
            (replace(images, stride=(2, 2)), ("y", "dx")),
            (WIDE_AND_DEEP, ("y", "dx", "dw")),
        )
    ),
    (TWO, ("dw", "both")),
    (DEEP, ("y", "dw")),
    (replace(DEEP, nhwc=False), ("dw", "both")),
    (replace(MANY, nhwc=False, padding=(2, 2), dilation=(2, 2)), ("y",)),
]
LARGE = [(case, name) for case, names in WITH_RESULTS for name in names]


@pytest.mark.parametrize(("case", "name"), LARGE, ids=str)
def test_more_than_two_to_the_31_elements(gpu: Gpu, case: Case, name: str) -> None:
    run = LargeRun(gpu, case, torch.bfloat16)
    assert run.x.numel() > 2**31
    assert_right(run, name)
