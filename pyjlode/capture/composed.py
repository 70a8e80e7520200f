"""Functions of PyTorch that have kernels of their own, as compositions of operations that are compiled.

So their derivatives are compiled too, and small systems of equations are solved where they stand: a call
of LAPACK costs more than the arithmetic of a few numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# Rows of a matrix: elimination is written out, and its length grows with the third power.
_MOST = 8


class Composed(TorchFunctionMode):
    """Has such functions be their compositions.

    A matrix that is singular, where PyTorch raises, gives numbers that are not finite.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        composition = None if "out" in kwargs else _COMPOSITIONS.get(function)
        result = NotImplemented if composition is None else composition(*args, **kwargs)
        return function(*args, **kwargs) if result is NotImplemented else result


_COMPOSITIONS: dict[Any, Callable[..., Any]] = {}


def composes(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Have what follows stand for functions; it returns `NotImplemented` where it does not."""

    def keep(composition: Callable[..., Any]) -> Callable[..., Any]:
        _COMPOSITIONS.update(dict.fromkeys(functions, composition))
        return composition

    return keep


def _is_small(a: Tensor) -> bool:
    return a.is_floating_point() and a.dim() >= 2 and a.shape[-1] == a.shape[-2] and 0 < a.shape[-1] <= _MOST


def _eliminated(a: Tensor, b: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """Gaussian elimination with partial pivoting (Golub & Van Loan, Matrix Computations, section 3.4), as in LAPACK.

    Returns:
        The rows of an upper triangular matrix with the right-hand sides behind it, each (..., n + m), and the sign of
        the rows' order, (..., 1).
    """
    n = a.shape[-1]
    rows = list((a if b is None else torch.cat([a.expand(*b.shape[:-2], n, n), b], -1)).unbind(-2))
    sign = torch.ones_like(rows[0][..., :1])
    for k in range(n):
        for i in range(k + 1, n):  # the largest number of a column comes first
            larger = rows[i][..., k : k + 1].abs() > rows[k][..., k : k + 1].abs()
            rows[k], rows[i] = torch.where(larger, rows[i], rows[k]), torch.where(larger, rows[k], rows[i])
            sign = torch.where(larger, -sign, sign)
        for i in range(k + 1, n):
            rows[i] = rows[i] - rows[i][..., k : k + 1] / rows[k][..., k : k + 1] * rows[k]
    return rows, sign


def _substituted(rows: Sequence[Tensor], upper: bool) -> Tensor:
    """The solution, (..., n, m), of a triangular system."""
    n = len(rows)
    solution: dict[int, Tensor] = {}
    for k in reversed(range(n)) if upper else range(n):
        x = rows[k][..., n:]
        for j, known in solution.items():
            x = x - rows[k][..., j : j + 1] * known
        solution[k] = x / rows[k][..., k : k + 1]
    return torch.stack([solution[k] for k in range(n)], -2)


@composes(torch.linalg.solve)
def _solve(A: Tensor, B: Tensor, *, left: bool = True) -> Any:
    if not _is_small(A):
        return NotImplemented
    if B.dim() == 1 or B.shape == A.shape[:-1]:  # vectors, as PyTorch tells them from matrices
        return _solve(A, B.unsqueeze(-1)).squeeze(-1)
    if not left:
        return _solve(A.mT, B.mT).mT
    batch = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
    return _substituted(_eliminated(A, B.expand(*batch, *B.shape[-2:]))[0], True)


@composes(torch.linalg.inv, torch.inverse, Tensor.inverse)
def _inverse(A: Tensor) -> Any:
    return _solve(A, torch.eye(A.shape[-1], dtype=A.dtype, device=A.device).expand(A.shape))


@composes(torch.linalg.slogdet, torch.slogdet, Tensor.slogdet)
def _sign_and_logarithm(A: Tensor) -> Any:
    if not _is_small(A):
        return NotImplemented
    rows, sign = _eliminated(A, None)
    diagonal = torch.stack([row[..., k] for k, row in enumerate(rows)], -1)
    return sign.squeeze(-1) * diagonal.sign().prod(-1), diagonal.abs().log().sum(-1)


@composes(torch.linalg.det, torch.det, Tensor.det)
def _determinant(A: Tensor) -> Any:
    if not _is_small(A):
        return NotImplemented
    rows, sign = _eliminated(A, None)
    product = sign.squeeze(-1)
    for k, row in enumerate(rows):
        product = product * row[..., k]
    return product


@composes(torch.logdet, Tensor.logdet)
def _logarithm(A: Tensor) -> Any:
    both = _sign_and_logarithm(A)
    return both if both is NotImplemented else torch.where(both[0] < 0, torch.nan, both[1])


@composes(torch.linalg.cholesky, torch.cholesky, Tensor.cholesky)
def _cholesky(A: Tensor, upper: bool = False) -> Any:
    if not _is_small(A):
        return NotImplemented
    n, zero = A.shape[-1], torch.zeros_like(A[..., 0, 0])
    entries = [[zero] * n for _ in range(n)]
    for j in range(n):
        for i in range(j, n):
            x = A[..., i, j]
            for k in range(j):
                x = x - entries[i][k] * entries[j][k]
            entries[i][j] = x.sqrt() if i == j else x / entries[j][j]
    lower = torch.stack([torch.stack(row, -1) for row in entries], -2)
    return lower.mT if upper else lower


@composes(torch.linalg.solve_triangular)
def _solve_triangular(A: Tensor, B: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False) -> Any:
    if not _is_small(A) or unitriangular:
        return NotImplemented
    if not left:
        return _solve_triangular(A.mT, B.mT, upper=not upper).mT
    batch = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
    A, B = (x.expand(*batch, *x.shape[-2:]) for x in (A, B))
    return _substituted(torch.cat([A, B], -1).unbind(-2), upper)


@composes(torch.cholesky_solve, Tensor.cholesky_solve)
def _cholesky_solve(B: Tensor, L: Tensor, upper: bool = False) -> Any:
    if not _is_small(L):
        return NotImplemented
    lower = L.mT if upper else L
    return _solve_triangular(lower.mT, _solve_triangular(lower, B, upper=False), upper=True)


@composes(torch.cdist)
def _distances(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: Any = None) -> Any:
    if p != 2:
        return NotImplemented
    squares = (x1.unsqueeze(-2) - x2.unsqueeze(-3)).square().sum(-1)
    apart = squares > 0  # the derivative by points in one place is zero, as PyTorch's
    return torch.where(apart, torch.where(apart, squares, 1.0).sqrt(), 0.0)


@composes(functional.batch_norm)
def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if training or running_mean is None or running_var is None:
        return NotImplemented
    along = [1, -1, *[1] * (input.dim() - 2)]
    x = (input - running_mean.reshape(along)) * torch.rsqrt(running_var.reshape(along) + eps)
    x = x if weight is None else x * weight.reshape(along)
    return x if bias is None else x + bias.reshape(along)


@composes(torch.bilinear)
def _bilinear(x1: Tensor, x2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out = torch.einsum("...i,oij,...j->...o", x1, weight, x2)
    return out if bias is None else out + bias


@composes(functional.embedding)
def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    return NotImplemented if padding_idx is not None or max_norm or scale_grad_by_freq else weight[input]
