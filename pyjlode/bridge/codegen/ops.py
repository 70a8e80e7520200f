"""Element-wise operations of ATen as scalar expressions: what both modes of generation share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .code import Code

Formula = Callable[..., int]
ELEMENTWISE: dict[str, Formula] = {}


def _plain(julia: str) -> Formula:
    return lambda c, *args: c.make(julia, *args)


def words(text: str) -> list[str]:
    return text.split()


for _name in (
    *words("neg exp expm1 exp2 log log2 log10 log1p sqrt sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh"),
    *words("erf erfc abs sign floor ceil trunc atan2 hypot"),
):
    ELEMENTWISE[_name] = _plain(_name)
for _name, _julia in {
    "sgn": "sign",
    "minimum": "min",
    "maximum": "max",
    "fmin": "fmin",
    "fmax": "fmax",
    "le": "le",
    "lt": "lt",
    "eq": "eq",
    "ne": "ne",
    "logical_and": "and",
    "logical_or": "or",
    "logical_not": "not",
    "bitwise_and": "and",
    "bitwise_or": "or",
    "bitwise_not": "not",
    "round": "roundeven",
    "isnan": "isnan",
    "fmod": "fmod",
    "remainder": "remainder",
    "xlogy": "xlogy",
}.items():
    ELEMENTWISE[_name] = _plain(_julia)


def formula(f: Formula) -> Formula:
    ELEMENTWISE[f.__name__.rstrip("_")] = f
    return f


@formula
def add(c: Code, x: int, y: int, alpha: float = 1) -> int:
    return c.make("add", x, y if alpha == 1 else c.make("mul", c.constant(alpha), y))


@formula
def sub(c: Code, x: int, y: int, alpha: float = 1) -> int:
    return c.make("sub", x, y if alpha == 1 else c.make("mul", c.constant(alpha), y))


@formula
def rsub(c: Code, x: int, y: int, alpha: float = 1) -> int:
    return sub(c, y, x, alpha)


@formula
def mul(c: Code, x: int, y: int) -> int:
    return c.make("mul", x, y)


@formula
def div(c: Code, x: int, y: int, rounding_mode: str | None = None) -> int:
    quotient = c.make("div", x, y)
    return quotient if rounding_mode is None else c.make(rounding_mode, quotient)


@formula
def pow_(c: Code, x: int, y: int) -> int:
    return c.make("pow", x, y)


@formula
def gt(c: Code, x: int, y: int) -> int:
    return c.make("lt", y, x)


@formula
def ge(c: Code, x: int, y: int) -> int:
    return c.make("le", y, x)


@formula
def logical_xor(c: Code, x: int, y: int) -> int:
    return c.make("ne", x, y)


@formula
def where(c: Code, condition: int, x: int, y: int) -> int:
    return c.make("ifelse", condition, x, y)


@formula
def masked_fill(c: Code, x: int, mask: int, value: int) -> int:
    return c.make("ifelse", mask, value, x)


@formula
def clamp(c: Code, x: int, low: int | None = None, high: int | None = None) -> int:
    x = x if low is None else c.make("max", x, low)
    return x if high is None else c.make("min", x, high)


@formula
def clamp_min(c: Code, x: int, low: int) -> int:
    return c.make("max", x, low)


@formula
def clamp_max(c: Code, x: int, high: int) -> int:
    return c.make("min", x, high)


@formula
def square(c: Code, x: int) -> int:
    return c.make("mul", x, x)


@formula
def reciprocal(c: Code, x: int) -> int:
    return c.make("div", c.one, x)


@formula
def rsqrt(c: Code, x: int) -> int:
    return c.make("div", c.one, c.make("sqrt", x))


@formula
def frac(c: Code, x: int) -> int:
    return c.make("sub", x, c.make("trunc", x))


@formula
def sigmoid(c: Code, x: int) -> int:
    return c.make("sigmoid", x)


@formula
def relu(c: Code, x: int) -> int:
    return c.make("max", x, c.zero)


@formula
def hardtanh(c: Code, x: int, low: int | None = None, high: int | None = None) -> int:
    return clamp(c, x, c.constant(-1.0) if low is None else low, c.one if high is None else high)


@formula
def leaky_relu(c: Code, x: int, slope: int | None = None) -> int:
    slope = c.constant(0.01) if slope is None else slope
    return c.make("ifelse", c.make("lt", c.zero, x), x, c.make("mul", x, slope))


@formula
def softplus(c: Code, x: int, beta: int | None = None, threshold: int | None = None) -> int:
    beta = c.one if beta is None else beta
    threshold = c.constant(20.0) if threshold is None else threshold
    scaled = c.make("mul", x, beta)
    small = c.make("div", c.make("log1p", c.make("exp", scaled)), beta)
    return c.make("ifelse", c.make("lt", threshold, scaled), x, small)


@formula
def silu(c: Code, x: int) -> int:
    return c.make("mul", x, sigmoid(c, x))


@formula
def elu(c: Code, x: int, alpha: int | None = None, scale: int | None = None, input_scale: int | None = None) -> int:
    alpha, scale, input_scale = (c.one if a is None else a for a in (alpha, scale, input_scale))
    negative = c.make("mul", alpha, c.make("expm1", c.make("mul", x, input_scale)))
    return c.make("mul", scale, c.make("ifelse", c.make("lt", c.zero, x), x, negative))


_ROOT = math.sqrt(2 / math.pi)


def _gelu_inner(c: Code, x: int) -> int:
    cube = c.make("mul", c.make("mul", x, x), x)
    inner = c.make("add", x, c.make("mul", c.constant(0.044715), cube))
    return c.make("tanh", c.make("mul", c.constant(_ROOT), inner))


def _normal(c: Code, x: int) -> int:
    """The distribution function of the normal distribution."""
    erf = c.make("erf", c.make("mul", x, c.constant(math.sqrt(0.5))))
    return c.make("mul", c.constant(0.5), c.make("add", c.one, erf))


@formula
def gelu(c: Code, x: int, approximate: str = "none") -> int:
    if approximate == "none":
        return c.make("mul", x, _normal(c, x))
    return c.make("mul", c.make("mul", c.constant(0.5), x), c.make("add", c.one, _gelu_inner(c, x)))


@formula
def gelu_backward(c: Code, g: int, x: int, approximate: str = "none") -> int:
    half, square_ = c.constant(0.5), c.make("mul", x, x)
    if approximate == "none":
        density = c.make("exp", c.make("mul", c.constant(-0.5), square_))
        slope = c.make("mul", c.constant(1 / math.sqrt(2 * math.pi)), c.make("mul", x, density))
        return c.make("mul", g, c.make("add", _normal(c, x), slope))
    t = _gelu_inner(c, x)
    inner = c.make("add", c.one, c.make("mul", c.constant(3 * 0.044715), square_))
    slope = c.make("mul", c.make("sub", c.one, c.make("mul", t, t)), c.make("mul", c.constant(_ROOT), inner))
    total = c.make("add", c.make("add", c.one, t), c.make("mul", x, slope))
    return c.make("mul", g, c.make("mul", half, total))


@formula
def tanh_backward(c: Code, g: int, y: int) -> int:
    return c.make("mul", g, c.make("sub", c.one, c.make("mul", y, y)))


@formula
def sigmoid_backward(c: Code, g: int, y: int) -> int:
    return c.make("mul", g, c.make("mul", c.make("sub", c.one, y), y))


@formula
def threshold_backward(c: Code, g: int, x: int, threshold: int) -> int:
    return c.make("ifelse", c.make("le", x, threshold), c.zero, g)


@formula
def threshold(c: Code, x: int, limit: int, value: int) -> int:
    return c.make("ifelse", c.make("le", x, limit), value, x)


def _shrink_backward(c: Code, g: int, x: int, limit: int) -> int:
    return c.make("ifelse", c.make("le", c.make("abs", x), limit), c.zero, g)


ELEMENTWISE["hardshrink_backward"] = ELEMENTWISE["softshrink_backward"] = _shrink_backward


@formula
def hardtanh_backward(c: Code, g: int, x: int, low: int, high: int) -> int:
    outside = c.make("or", c.make("le", x, low), c.make("le", high, x))
    return c.make("ifelse", outside, c.zero, g)


@formula
def leaky_relu_backward(c: Code, g: int, x: int, slope: int, is_result: bool) -> int:
    return c.make("ifelse", c.make("lt", c.zero, x), g, c.make("mul", g, slope))


@formula
def softplus_backward(c: Code, g: int, x: int, beta: int, threshold: int) -> int:
    scaled = c.make("mul", x, beta)
    return c.make("ifelse", c.make("lt", threshold, scaled), g, c.make("mul", g, sigmoid(c, scaled)))


@formula
def silu_backward(c: Code, g: int, x: int) -> int:
    s = sigmoid(c, x)
    slope = c.make("add", c.one, c.make("mul", x, c.make("sub", c.one, s)))
    return c.make("mul", g, c.make("mul", s, slope))


@formula
def elu_backward(c: Code, g: int, alpha: int, scale: int, input_scale: int, is_result: bool, x: int) -> int:
    if is_result:
        negative = c.make("mul", input_scale, c.make("add", x, c.make("mul", alpha, scale)))
    else:
        rate = c.make("mul", c.make("mul", input_scale, alpha), scale)
        negative = c.make("mul", rate, c.make("exp", c.make("mul", x, input_scale)))
    return c.make("mul", g, c.make("ifelse", c.make("le", x, c.zero), negative, scale))


@formula
def addcmul(c: Code, x: int, a: int, b: int, value: float = 1) -> int:
    return add(c, x, c.make("mul", a, b), value)


@formula
def addcdiv(c: Code, x: int, a: int, b: int, value: float = 1) -> int:
    return add(c, x, c.make("div", a, b), value)


@formula
def lerp(c: Code, x: int, y: int, weight: int) -> int:
    return c.make("add", x, c.make("mul", weight, c.make("sub", y, x)))


@formula
def copysign(c: Code, x: int, y: int) -> int:
    return c.make("copysign", x, y)


# Positions of arguments that are words or flags of the formula itself, not elements.
_POSITIONAL = {"gelu": {1}, "gelu_backward": {2}, "elu_backward": {4}, "leaky_relu_backward": {3}}


def is_setting(op: str, position: int, value: Any) -> bool:
    """Whether a positional argument of an element-wise operation is a setting of its formula."""
    return isinstance(value, str) or value is None or position in _POSITIONAL.get(op, ())
