"""What the examples claim, in the weaker form that seconds of training can bear."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# An example is a program: it imports its neighbours by their bare names.
sys.path.append(str(EXAMPLES))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run an example, quick, and look for its picture."""
    monkeypatch.chdir(tmp_path)

    def run(name: str):
        result = importlib.import_module(name).main(["--quick"])
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        return result

    return run


def test_cnf_density(run, tmp_path):
    result = run("cnf_density")
    moons = result["densities"]["two moons"]
    assert moons["mass"] == pytest.approx(1, abs=0.01)
    assert moons["of_bound"] < 1
    assert moons["round_trip"] < 1e-5 * moons["amplification"]
    assert moons["log_likelihood"] > moons["gaussian"] + 0.05
    rows = result["rows"]
    assert rows["continuous normalizing flow"] > rows["Gaussian, full covariance"]
    assert (tmp_path / "cnf_density.gif").stat().st_size > 10_000


def test_odenet_digits(run):
    """As good as the ResNet to within three points, with less than half the parameters; memory that grows with depth
    for the ResNet, and not with evaluations for the O(1) adjoint."""
    result = run("odenet_digits")
    ode, resnet = result["networks"]["ODE-Net"], result["networks"]["ResNet"]
    assert ode["error"] < resnet["error"] + 3
    assert ode["parameters"] < resnet["parameters"] / 2
    memory = result["memory"]
    assert memory["ResNet"][-1] > 3 * memory["ResNet"][1]  # four times the depth
    assert memory["ODE-Net, backsolve"][-1] < 1.2 * memory["ODE-Net, backsolve"][1]


def test_adaptive_depth(run):
    """Less work at a looser tolerance, and a larger error; less work for easy points than for hard ones."""
    result = run("adaptive_depth")
    points, digits = result["disc and ring"], result["digits"]
    for found in (points, digits):
        nfe, far = [row[1] for row in found.dial], [row[3] for row in found.dial]
        assert nfe == sorted(nfe)
        assert nfe[-1] > 2 * nfe[0]
        assert far[-1] < far[0] / 5
    error = [row[2] for row in points.dial]
    assert error[-1] < 15
    assert error[0] > 1.5 * error[-1]
    assert points.rank > 0.2
    assert points.quarters[0][0] < points.quarters[3][0]


def test_deep_equilibrium(run):
    """The gradient through a solve comes near the one at rest, the later it ends, and takes more memory."""
    found = run("deep_equilibrium")
    assert found.error < 15
    assert found.off[0] > 0.1
    assert found.off[-1] < 1e-3
    assert found.megabytes[-1] > 2 * found.at_rest


def test_latent_spirals(run):
    """Where it has seen nothing, the latent ODE goes on better than the RNN, and much better than the last point; where
    the spirals were seen it is nearer to them still."""
    errors = run("latent_spirals")[30]
    assert errors["latent_ode"] < errors["rnn"]
    assert errors["latent_ode"] < errors["still"] / 3
    assert errors["within"] < errors["still"] / 6


def test_co2_irregular(run):
    errors = run("co2_irregular")
    assert errors["latent ODE"]["forecast"] < errors["mean of what is seen"]["forecast"]
    assert errors["Gaussian process"]["interpolation"] < 0.6


def test_resumed_training_is_the_training(tmp_path):
    """Stopped after 6 of 10 steps and resumed: the same history and weights, batches drawn at random and all."""
    from shared import fit

    def training(folder: Path, steps: int, resume: bool):
        args = argparse.Namespace(name="x", seed=0, quick=True, resume=resume, checkpoints=folder)
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)

        def step(i):
            loss = model(torch.randn(8, 2)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return {"loss": loss.item()}

        return fit("y", {"model": model, "optimizer": optimizer}, step, steps, args, every=3), model.weight

    whole, weight = training(tmp_path / "a", 10, False)
    training(tmp_path / "b", 6, False)
    resumed, again = training(tmp_path / "b", 10, True)
    assert resumed == whole
    assert torch.equal(weight, again)


def test_bouncing_balls(run):
    """Each ball comes down in the cup, by a throw of its own: the less it keeps of its speed, the harder."""
    found = run("bouncing_balls")
    assert all(f.misses[-1] < 0.01 * f.misses[0] for f in found.values())
    speeds = [float(f.v.norm()) for f in found.values()]
    assert speeds == sorted(speeds)


def test_drug_doses(run):
    found = run("drug_doses")
    assert found.errors.tolist() == pytest.approx([0.0, 0.0, 0.0], abs=0.2)
    assert found.late == pytest.approx(52.5, abs=0.8)


def test_neuron(run):
    found = run("neuron")
    assert found.errors[1] < found.errors[0] / 4
    assert found.parameters.tolist() == pytest.approx([12.0, 80.0, 0.25, 2.5], rel=0.15)


def test_solar_system(run):
    found = run("solar_system")
    for method, (first, last) in found.items():
        assert last > 5 * first if method == "dopri5" else last < 1.2 * first < 5e-3


def test_hamiltonian(run):
    found = run("hamiltonian")
    for row in found.values():
        assert bool((row.errors[:, 1] < row.errors[:, 0] / 2).all())


def test_flow_matching(run):
    """Straighter paths by optimal pairs, and samples that are much nearer to the data than noise is."""
    found = run("flow_matching")
    for name in ("two moons", "eight Gaussians"):
        ways = found[name]
        assert ways["ot"].nfe <= ways["independent"].nfe
        assert ways["ot"].w2_euler < ways["independent"].w2_euler
        assert ways["ot"].w2 < 2 * ways["ot"].w2_data
    digits = found["digits"]["ot"]
    assert digits.w2 < 1.5 * digits.w2_data


def test_training_aids(run):
    """Fitted at once the curve is nearly flat; each aid gets it right. STEER's state stays nearer."""
    found = run("training_aids")
    flat = 0.859
    plain, *aids = (float(e[0]) for e in found.errors.values())
    assert plain > 0.8 * flat
    assert max(aids) < 0.25 * flat
    plain, steer = (e[0] for e in found.ends.values())
    assert float(steer[-1]) < 0.95 * float(plain[-1])


def test_graph_ode(run):
    found = run("graph_ode")
    assert float(found["karate club"]["graph ODE"]) > 85
    assert float(found["blocks"]["graph ODE"]) > float(found["blocks"]["GCN, 16 layers"]) + 10
