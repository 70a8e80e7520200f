"""Learn the friction of a double pendulum: a small network inside a law of motion that is known.

    python examples/double_pendulum.py [--quick] [--out double_pendulum.png]

Prints the error of the learned friction and writes double_pendulum.png.

A universal differential equation (Rackauckas et al. 2020): Lagrange's equations with an unknown torque at each joint,
which depends on how fast that joint turns. The data are angles and speeds with noise.
"""

from __future__ import annotations

import matplotlib
import torch
from shared import COLORS, FAINT, INK, STYLE, arguments, headline
from torch import Tensor, nn

import pyjlode
from pyjlode.plot import figure

G = 9.81
NOISE = 0.01


def acceleration(h: Tensor, torque: Tensor) -> Tensor:
    """Two rods of length 1 with masses 1 at their ends: M(θ) θ'' = forces + torque. h (..., 4), torque (..., 2)."""
    a, b, u, v = h.unbind(-1)
    c, s = torch.cos(a - b), torch.sin(a - b)
    p = torque[..., 0] - torque[..., 1] - s * v * v - 2 * G * torch.sin(a)
    q = torque[..., 1] + s * u * u - G * torch.sin(b)
    det = 2 - c * c
    return torch.stack([(p - c * q) / det, (2 * q - c * p) / det], -1)


def joint_speeds(h: Tensor) -> Tensor:
    return torch.stack([h[..., 2], h[..., 3] - h[..., 2]], -1)


def true_friction(speed: Tensor) -> Tensor:
    """Bearings that drag at once, and air."""
    return -0.3 * torch.tanh(4 * speed) - 0.05 * speed * speed.abs()


class Pendulum(nn.Module):
    """The law, with friction as a function of a joint's speed: (..., 2) -> (..., 2)."""

    def __init__(self, friction: nn.Module) -> None:
        super().__init__()
        self.friction = friction

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        torque = self.friction(joint_speeds(h)[..., None])[..., 0]
        return torch.cat([h[..., 2:], acceleration(h, torque)], -1)


class Odd(nn.Module):
    """An odd function: friction against a motion is that against its reverse, turned round."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1)).double()

    def forward(self, x: Tensor) -> Tensor:
        return (self.net(x) - self.net(-x)) / 2


class Truth(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return true_friction(x)


def main(warm_up: int = 30, iterations: int = 150, out: str = "double_pendulum.png", seed: int = 0) -> float:
    torch.manual_seed(seed)
    t = torch.linspace(0, 2, 41, dtype=torch.float64)
    h0 = torch.tensor([[1.2, 0.8, 0.0, 0.0], [-0.6, 1.0, 0.0, 0.0], [0.4, -1.2, 0.0, 0.0]], dtype=torch.float64)
    with torch.no_grad():
        clean = pyjlode.odeint(Pendulum(Truth()), h0, t, rtol=1e-8, atol=1e-8)
    data = clean + NOISE * torch.randn_like(clean)

    model = Pendulum(Odd())
    parameters = list(model.parameters())

    def loss() -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        h = pyjlode.odeint(model, h0, t, adjoint=True, method="tsit5", rtol=1e-5, atol=1e-5)
        value = (h - data).square().mean()
        value.backward()
        return value

    # A few steps of Adam find the size of the friction. Its shape is in a part of the loss that is hundreds of times
    # smaller, where Adam stays at four times the noise; a quasi-Newton method comes down to it.
    adam = torch.optim.Adam(parameters, lr=0.02)
    for _ in range(warm_up):
        loss()
        adam.step()
    each = 10
    newton = torch.optim.LBFGS(parameters, max_iter=each, history_size=30, line_search_fn="strong_wolfe")
    for i in range(0, iterations, each):
        newton.step(loss)
        if i % (3 * each) == 0 or i + each >= iterations:
            error = float(loss().detach().sqrt())
            print(f"iteration {i + each:4}: root mean square error {error:.4f} (noise: {NOISE})")

    speeds = joint_speeds(clean).abs().quantile(0.95)
    x = torch.linspace(-float(speeds), float(speeds), 101, dtype=torch.float64)
    with torch.no_grad():
        learned = model.friction(x[:, None])[:, 0]
        h = pyjlode.odeint(model, h0, t, rtol=1e-6, atol=1e-6)
    error = float((learned - true_friction(x)).norm() / true_friction(x).norm())
    print(f"the learned friction is off by {100 * error:.1f} % of the true one")

    with matplotlib.rc_context(STYLE):
        fig = figure(10, 4)
        left, right = fig.subplots(1, 2)
        left.plot(t, data[:, 0, :2], "o", color=FAINT, markersize=4)
        for i, name in enumerate(("upper rod", "lower rod")):
            left.plot(t, h[:, 0, i], color=COLORS[i], lw=2, label=name)
        left.set(title="One of three swings, measured and fitted", xlabel="time, s", ylabel="angle, rad")
        left.legend()
        right.plot(x, learned, color=COLORS[0], lw=3.4, label="learned")
        right.plot(x, true_friction(x), "--", color=INK, lw=1.2, label="true")
        right.set(title="Friction of a joint", xlabel="speed of the joint, rad/s", ylabel="torque, N m")
        right.legend(loc="upper right")
        headline(fig, f"The friction of a double pendulum, learned from three swings to within {error:.1%}")
        fig.savefig(out, dpi=120)
    return error


if __name__ == "__main__":
    args = arguments(__doc__, "double_pendulum", None)
    main(*((15, 20) if args.quick else (30, 150)), str(args.out), args.seed)
