"""What tests/test_ensembles.py sends to other processes, which import it by name."""

import os

import torch

import pyjlode


def lorenz(t, h, p):
    x, y, z = h.unbind(-1)
    return torch.stack([10 * (y - x), x * (p["rho"] - z) - y, x * y - 8 / 3 * z], -1)


def decay(t, h, rate):
    return -rate[:, None] * h


def blows_up(t, h, a):
    return a[:, None] * h**2


def kills(t, h, deadly):
    """Ends the process that works on a deadly system."""
    if bool((deadly > 0.5).any()):
        os._exit(3)
    return -h


def kills_once(t, h, p):
    """Ends the process the first time, which a file tells."""
    path = bytes(p[0].tolist()).rstrip(b"\0").decode()
    if not os.path.exists(path):
        with open(path, "w"):
            pass
        os._exit(3)
    return -h


def mistaken(t, h):
    raise KeyError("no such thing")


def fit(data):
    """The rate of a decay, by gradients."""
    t, h = data
    rate = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([rate], max_iter=20, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = (pyjlode.odeint(lambda t, x: -rate * x, h[:1], t, rtol=1e-6)[:, 0] - h).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return rate.item()


def fit_or_fail(data):
    if data is None:
        raise ValueError("no data")
    return fit(data)
