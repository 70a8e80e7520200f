"""The compositions that stand for PyTorch's functions in compiled fields: their values and first two derivatives."""

import pytest
import torch
import torch.nn.functional as F

from pyjlode.capture.composed import Composed

torch.manual_seed(0)
SPD = lambda a: a @ a.mT + torch.eye(a.shape[-1]).to(a)  # noqa: E731
SHIFTED = lambda a: a + 3 * torch.eye(a.shape[-1]).to(a).flip(0)  # noqa: E731
FUNCTIONS = {
    "solve_vector": lambda a, b: torch.linalg.solve(SHIFTED(a)[0], b[0, :, 0]),
    "solve_vectors": lambda a, b: torch.linalg.solve(SHIFTED(a), b[..., 0]),
    "solve_matrices": lambda a, b: torch.linalg.solve(SHIFTED(a), b),
    "solve_of_one": lambda a, b: torch.linalg.solve(SHIFTED(a)[0], b),
    "solve_right": lambda a, b: torch.linalg.solve(SHIFTED(a), b.mT, left=False),
    "inv": lambda a, b: torch.linalg.inv(SHIFTED(a)) + torch.inverse(SPD(a)) + SHIFTED(a).inverse(),
    "det": lambda a, b: torch.linalg.det(SHIFTED(a)) + a.det(),
    "slogdet": lambda a, b: torch.cat(torch.linalg.slogdet(SHIFTED(a))),
    "logdet": lambda a, b: torch.logdet(SPD(a)),
    "cholesky": lambda a, b: torch.linalg.cholesky(SPD(a)) + torch.linalg.cholesky(SPD(a), upper=True),
    "cholesky_solve": lambda a, b: (
        torch.cholesky_solve(b, torch.linalg.cholesky(SPD(a)))
        + b.cholesky_solve(torch.linalg.cholesky(SPD(a), upper=True), upper=True)
    ),
    "solve_triangular": lambda a, b: (
        torch.linalg.solve_triangular(SPD(a).tril(), b, upper=False)
        + torch.linalg.solve_triangular(SPD(a).triu(), b.mT, upper=True, left=False).mT
        + torch.linalg.solve_triangular(a.triu(), b, upper=True, unitriangular=True)
    ),
    "cdist": lambda a, b: torch.cdist(a, b.mT) + torch.cdist(a, b.mT, p=1.0),
    "batch_norm": lambda a, b: F.batch_norm(a, b[0, :, 0].detach(), b[1, :, 0].detach() ** 2 + 1, b[0, :, 1]),
    "embedding": lambda a, b: F.embedding(torch.tensor([2, 0, 2]) % len(a[0]), a[0]),
    "bilinear": lambda a, b: F.bilinear(a[0], a[1], a, b[:, 0, 0]),
}


@pytest.mark.parametrize("n", [1, 3, 8, 9])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_composition(name, n):
    """The matrices that are solved with want pivoting; those of nine rows are left to PyTorch."""
    f = FUNCTIONS[name]
    a = torch.randn(2, n, n, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, n, 2, dtype=torch.float64, requires_grad=True)

    def all_of(inside):
        if inside:
            with Composed():
                value = f(a, b)
        else:
            value = f(a, b)
        weight = torch.linspace(0.5, 1.5, value.numel(), dtype=torch.float64).reshape(value.shape)
        first = torch.autograd.grad((weight * value.sin()).sum(), (a, b), create_graph=True, materialize_grads=True)
        if name == "cdist":  # PyTorch's own has no second derivative
            return value, *first
        scalar = sum((x.sin()).sum() for x in first)
        return value, *first, *torch.autograd.grad(scalar, (a, b), materialize_grads=True)

    torch.testing.assert_close(all_of(True), all_of(False), rtol=1e-7, atol=1e-9)


def test_points_in_one_place_have_no_direction():
    x = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    with Composed():
        (grad,) = torch.autograd.grad(torch.cdist(x, x).sum(), x)
    assert torch.equal(grad, torch.zeros_like(x))


def test_a_singular_matrix_gives_no_number():
    a = torch.ones(2, 2, dtype=torch.float64)
    with Composed():
        assert not torch.linalg.solve(a, torch.tensor([1.0, 2.0], dtype=torch.float64)).isfinite().any()
        assert torch.linalg.det(a) == 0
