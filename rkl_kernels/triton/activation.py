"""The activations' formulas and derivatives for Triton kernels. They are those of csrc/activation.h, in float32."""

import triton
import triton.language as tl

from .._checks import ACTIVATIONS

# An operator's number for an activation is its position in ACTIVATIONS plus one; 0 is no activation.
_NUMBER = {name: number for number, name in enumerate(ACTIVATIONS, 1)}
RELU = tl.constexpr(_NUMBER["relu"])
RELU6 = tl.constexpr(_NUMBER["relu6"])
TRELU = tl.constexpr(_NUMBER["trelu"])
SILU = tl.constexpr(_NUMBER["silu"])
GELU = tl.constexpr(_NUMBER["gelu"])


@triton.jit
def tanh(x):
    """tanh to 2 ulp. Below 0.55 it is an odd polynomial, since 1 - 2 / (exp(2x) + 1) cancels there. No library is
    called, so that tanh is the same function on every GPU and in the interpreter."""
    square = x * x
    small = x + x * square * (-0.33332768 + square * (0.13315299 + square * (-0.052304076 + square * 0.015739683)))
    magnitude = tl.abs(x)
    large = 1.0 - 2.0 / (tl.exp(2.0 * magnitude) + 1.0)
    return tl.where(magnitude < 0.55, small, tl.where(x < 0, -large, large))


@triton.jit
def trelu(x):
    """Equation (6): x above zero, tanh(x) elsewhere. NaN fails the comparison, and tanh keeps it NaN."""
    return tl.where(x > 0, x, tanh(x))


@triton.jit
def trelu_derivative(y):
    """T-ReLU's derivative dy/dx, from its output: 1 where y > 0, else 1 - tanh^2 = 1 - y^2."""
    return tl.where(y > 0, 1.0, 1.0 - y * y)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of ``x``. The comparisons are written so that NaN stays NaN."""
    if ACTIVATION == RELU:
        x = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == RELU6:
        x = tl.where(x < 0, 0.0, tl.where(x > 6, 6.0, x))
    elif ACTIVATION == TRELU:
        x = trelu(x)
    elif ACTIVATION == SILU:
        x = x * tl.sigmoid(x)
    elif ACTIVATION == GELU:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.70710678))
    return x


@triton.jit
def derivative_from_output(y, ACTIVATION: tl.constexpr):
    """The activation's derivative, from its output. silu and gelu are not served: they are not monotonic, so the output
    does not give the derivative. At NaN the gradient passes, as in PyTorch."""
    derivative = tl.full(y.shape, 1.0, tl.float32)
    if ACTIVATION == RELU:
        derivative = tl.where(y <= 0, 0.0, 1.0)
    elif ACTIVATION == RELU6:
        derivative = tl.where((y <= 0) | (y >= 6), 0.0, 1.0)
    elif ACTIVATION == TRELU:
        derivative = trelu_derivative(y)
    return derivative


@triton.jit
def derivative_from_input(x, ACTIVATION: tl.constexpr):
    """The activation's derivative, from its input."""
    derivative = derivative_from_output(x, ACTIVATION)
    if ACTIVATION == TRELU:
        derivative = trelu_derivative(trelu(x))
    elif ACTIVATION == SILU:
        s = tl.sigmoid(x)
        derivative = s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == GELU:
        derivative = 0.5 * (1.0 + tl.erf(x * 0.70710678)) + x * 0.39894228 * tl.exp(-0.5 * x * x)
    return derivative


@triton.jit
def times_derivative(grad, derivative, ACTIVATION: tl.constexpr):
    """The gradient times the derivative. relu and relu6 select, as in PyTorch, since infinity times 0 would be NaN."""
    if (ACTIVATION == RELU) | (ACTIVATION == RELU6):
        product = tl.where(derivative == 0, 0.0, grad)
    else:
        product = grad * derivative
    return product
