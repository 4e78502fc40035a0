"""The corrected interpreter computes as a GPU does, and its sanitizer finds planted bugs."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

BLOCK = 64


@triton.jit
def arithmetic(x, y, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(out + at, a + b)
    tl.store(out + BLOCK + at, a * b)
    tl.store(out + 2 * BLOCK + at, tl.abs(a))
    tl.store(out + 3 * BLOCK + at, tl.where(a > b, a, b))


def test_bf16_arithmetic_rounds_as_torch_does():
    x, y = torch.randn(2, BLOCK).bfloat16()
    out = torch.empty(4, BLOCK, dtype=torch.bfloat16)
    arithmetic[(1,)](x, y, out, BLOCK=BLOCK)
    assert torch.equal(out, torch.stack([x + y, x * y, x.abs(), torch.maximum(x, y)]))


@triton.jit
def cast(x, out, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < n, other=0.0).to(tl.bfloat16), mask=at < n)


def test_casts_to_bf16_round_to_nearest_even():
    special = [float("nan"), float("inf"), -float("inf"), 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-9, 3.4e38, 1e-40, 0.0, -0.0]
    x = torch.cat([torch.randn(500), torch.tensor(special)])
    out = torch.empty(x.numel(), dtype=torch.bfloat16)
    cast[(1,)](x, out, x.numel(), BLOCK=512)
    assert torch.equal(out.nan_to_num(7), x.bfloat16().nan_to_num(7))
    assert torch.equal(out.isnan(), x.isnan())


@triton.jit
def minmax(x, y, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(out + at, tl.maximum(a, b))
    tl.store(out + BLOCK + at, tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL))
    tl.store(out + 2 * BLOCK + at, tl.sum(tl.where(at < 2, b, 0.0), 0))


def test_maximum_drops_nan_unless_told():
    x, y, out = torch.tensor([float("nan"), 1.0]), torch.tensor([1.0, 2.0]), torch.empty(3, 2)
    minmax[(1,)](x, y, out, BLOCK=2)
    assert out[0].tolist() == [1.0, 2.0]
    assert out[1].isnan().tolist() == [True, False]
    assert out[2].tolist() == [3.0, 3.0]


@triton.jit
def reads_beyond(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at + 1, mask=at < n, other=0.0), mask=at < n)


@triton.jit
def writes_beyond(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < n, other=0.0))


@triton.jit
def writes_twice(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at % 70, tl.load(x + at, mask=at < n, other=0.0), mask=at < n)


@triton.jit
def writes_twice_in_a_store(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at // 2, tl.load(x + at, mask=at < n, other=0.0), mask=at < n)


@triton.jit
def reads_what_others_wrote(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    before = tl.load(out + at - 1, mask=(at < n) & (at > 0), other=0.0)
    tl.store(out + at, tl.load(x + at, mask=at < n, other=0.0) + before, mask=at < n)


@triton.jit
def writes_what_others_read(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    after = tl.load(out + at + 1, mask=at + 1 < n, other=0.0)
    tl.store(out + at, tl.load(x + at, mask=at < n, other=0.0) + after, mask=at < n)


@triton.jit
def misaligned(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bytes_in = x.to(tl.pointer_type(tl.int8)) + 2
    value = tl.load(bytes_in.to(tl.pointer_type(tl.float32)) + at, mask=at + 1 < n, other=0.0)
    tl.store(out + at, value, mask=at < n)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (reads_beyond, "out-of-bounds load"),
        (writes_beyond, "out-of-bounds store"),
        (writes_twice, "another program has stored"),
        (writes_twice_in_a_store, "two lanes"),
        (reads_what_others_wrote, "another program writes"),
        (writes_what_others_read, "another program reads"),
        (misaligned, "misaligned"),
    ],
)
def test_planted_bugs_are_found(kernel, message):
    n = 100
    with pytest.raises(InterpreterError, match=message):
        kernel[(2,)](torch.randn(n), torch.zeros(n), n, BLOCK=BLOCK)


@triton.jit
def uses_undefined_lanes(x, out, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out, tl.sum(tl.load(x + at, mask=at < n).to(tl.float32), 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lanes_masked_without_other_are_poison(dtype):
    out = torch.zeros(1)
    uses_undefined_lanes[(1,)](torch.ones(60, dtype=dtype), out, 60, BLOCK=BLOCK)
    assert np.isnan(out.item())
