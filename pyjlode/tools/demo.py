"""`pyjlode demo`: a neural ODE learns the cycle of hare and lynx from sixty years of the fur trade, and forecasts.

The model is a neural ODE and nothing else: a small network is the whole vector field, and nobody tells it who eats
whom. It is judged by 27 forecasts of five years, one from each of the years that follow its training.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import plot
from ..data import hare_lynx
from ..errors import BadOption
from ..methods import find
from ..nn import NeuralODE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SPECIES = ("hare", "lynx")
SEEN = 60  # years of the record that training sees, 1845 to 1904; the 31 after them are held back
AHEAD = 5  # years of a forecast: half a cycle
CYCLE = 10  # years


class Populations(nn.Module):
    """Pelts as a function of time: a neural ODE for the scaled logarithms of the counts.

    In logarithms no count can become negative, and a given error is the same fraction of a small count as of a large
    one, as is natural for trapping records. Scaled by mean and deviation, states and slopes are of order one, where a
    network is at home.

    Args:
        pelts: shape (T, 2), the training counts, in thousands.
        width: hidden units.
        solver_options: for `pyjlode.solve`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, pelts: Tensor, width: int = 32, **solver_options: Any) -> None:
        super().__init__()
        logs = pelts.log()
        self.register_buffer("mean", logs.mean(0))
        self.register_buffer("std", logs.std(0))
        self.net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2)).to(pelts.dtype)
        self.ode = NeuralODE(self.field, return_trajectory=True, **solver_options)

    def field(self, t: Tensor, h: Tensor) -> Tensor:
        """dh/dt per year, for scaled log-counts `h` of shape (..., 2). The same in every year: `t` is not used."""
        return self.net(h)

    def forward(self, h0: Tensor, years: Tensor) -> Tensor:
        """Scaled log-counts, shape (T, ..., 2), so many `years`, shape (T,), after `h0`, shape (..., 2)."""
        return self.ode(h0, years)

    def scaled(self, pelts: Tensor) -> Tensor:
        """Thousands of pelts, shape (..., 2) -> scaled log-counts."""
        return (pelts.log() - self.mean) / self.std

    def pelts(self, h: Tensor) -> Tensor:
        """Scaled log-counts, shape (..., 2) -> thousands of pelts."""
        return (h * self.std + self.mean).exp()

    @torch.no_grad()
    def forecast(self, pelts: Tensor, years: Tensor | None = None) -> Tensor:
        """Thousands of pelts from counts (..., 2): (AHEAD, ..., 2), one to AHEAD years later, or after `years`."""
        if years is None:
            return self.pelts(self(self.scaled(pelts), torch.arange(AHEAD + 1, dtype=pelts.dtype)))[1:]
        return self.pelts(self(self.scaled(pelts), years))


@dataclass
class History:
    """What happened in training, one entry for each iteration.

    Attributes:
        loss: mean squared error of the scaled log-counts over the years in use.
        nfe, nfe_backward: evaluations of the field in the solve, and in its backward pass.
        years: how many years ahead were in use.
    """

    loss: list[float] = field(default_factory=list)
    nfe: list[int] = field(default_factory=list)
    nfe_backward: list[int] = field(default_factory=list)
    years: list[int] = field(default_factory=list)


@dataclass
class Result:
    """The outcome of a demo, in thousands of pelts, hare first.

    Attributes:
        wall: time of the training, s.
        ready: time until two gradients were made, s: where Julia is set up, that starts it, and the field is compiled.
        amplitude: shape (2,), half the range of the training years.
        fit: shape (2,), root mean square error of the forecasts from and of training years.
        errors: who forecasts -> shape (AHEAD, 2), root mean square errors one to AHEAD years ahead, over all forecasts
            of the years held back: "neural ODE"; "linear model", of a year's logarithms from those of the year before,
            by least squares; "last cycle", what was counted ten years earlier; "last year", what was counted last.
    """

    model: Populations
    history: History
    wall: float
    ready: float
    amplitude: Tensor
    fit: Tensor
    errors: dict[str, Tensor]

    def error(self, name: str) -> Tensor:
        """Shape (2,), over all years ahead."""
        return self.errors[name].square().mean(0).sqrt()


def run(
    out: str | Path = "demo.png",
    *,
    seed: int = 0,
    adjoint: bool | str = True,
    method: str = "dopri5",
    engine: str = "auto",
    quick: bool = False,
) -> Result:
    """Fit a neural ODE to the record of hare and lynx, forecast, print a table, and write a picture.

    The same arguments give the same numbers on the same machine.

    Args:
        out: the picture; the ending picks the format (png, pdf, svg ...).
        seed: for the first weights.
        adjoint, method, engine: as in `pyjlode.solve`.
        quick: train for a few seconds only, for a rougher fit.

    Raises:
        ImportError: matplotlib is not installed.
        BadOption: the ending of `out` is no format of matplotlib's.
        FileNotFoundError: the folder of `out` does not exist.
        What `pyjlode.solve` raises.
    """
    # Before the training: who has no matplotlib, or no such folder, should not wait for the news.
    canvas = plot.figure(12, 8.2)
    _check_writable(Path(out), canvas)
    start = time.perf_counter()
    years, pelts = hare_lynx()
    # The data are rough to a tenth; two or three digits from the solver are plenty to train with.
    options: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-3}
    if not find(method).adaptive:
        options["options"] = {"step_size": 0.25}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Populations(pelts[:SEEN], method=method, adjoint=adjoint, engine=engine, **options)
    h0, _ = windows(model.scaled(pelts[:SEEN]))
    for _ in range(2):  # a wrong method, adjoint or engine is said here, before there is a progress bar
        model(h0, torch.tensor([0.0, 1.0], dtype=h0.dtype)).sum().backward()
    ready = time.perf_counter() - start
    start = time.perf_counter()
    history = train(model, pelts[:SEEN], iterations=100 if quick else 300)
    wall = time.perf_counter() - start

    then, told = windows(pelts[:SEEN])
    fit = rmse(model.forecast(then), told).square().mean(0).sqrt()
    result = Result(
        model=model,
        history=history,
        wall=wall,
        ready=ready,
        amplitude=(pelts[:SEEN].amax(0) - pelts[:SEEN].amin(0)) / 2,
        fit=fit,
        errors=judged(model, pelts),
    )
    print(table(result, years))
    draw(canvas, result, years, pelts)
    canvas.savefig(out, dpi=160)
    print(f"picture     {out}")
    return result


def _check_writable(out: Path, canvas: Figure) -> None:
    formats = canvas.canvas.get_supported_filetypes()
    if out.suffix and out.suffix[1:].lower() not in formats:  # without an ending matplotlib appends .png
        raise BadOption(f"pictures cannot be written as {out.suffix!r}; there are {', '.join(sorted(formats))}.")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"the folder {str(out.parent)!r} of the picture does not exist.")


def windows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each year but the last ones, and the years that follow it: (T, 2) -> (T - AHEAD, 2) and (AHEAD, T - AHEAD, 2)."""
    cut = x.unfold(0, AHEAD + 1, 1).permute(2, 0, 1)
    return cut[0], cut[1:]


def train(model: Populations, pelts: Tensor, *, iterations: int) -> History:
    """Fit forecasts of AHEAD years from every training year, all at once, by AdamW. The fit begins with two years and
    takes in the others one by one over half of the iterations: asked for all at once, a network tends to settle for the
    mean.

    Args:
        pelts: shape (T, 2), in thousands.
    """
    h0, target = windows(model.scaled(pelts))
    optimizer = torch.optim.AdamW(model.net.parameters(), lr=0.02, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations, eta_min=4e-4)
    history = History()
    bar = tqdm(range(iterations), desc="training", unit="it", dynamic_ncols=True)
    for i in bar:
        n = min(AHEAD, 2 + 2 * (AHEAD - 1) * i // iterations)
        h = model(h0, torch.arange(n + 1, dtype=h0.dtype))
        loss = (h[1:] - target[:n]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        history.loss.append(loss.item())
        history.nfe.append(model.ode.nfe)
        history.nfe_backward.append(model.ode.nfe_backward)
        history.years.append(n)
        bar.set_postfix_str(
            f"{n} years, loss {history.loss[-1]:.4f}, nfe {history.nfe[-1]} forward, {history.nfe_backward[-1]} "
            f"backward",
            refresh=False,
        )
    return history


def judged(model: Populations, pelts: Tensor) -> dict[str, Tensor]:
    """`Result.errors`: a forecast from the last training year and from each year held back that has AHEAD after it."""
    then, told = windows(pelts[SEEN - 1 :])
    others = {
        "neural ODE": model.forecast(then),
        "linear model": model.pelts(_linear(model.scaled(pelts[:SEEN]), model.scaled(then))),
        "last cycle": windows(pelts[SEEN - 1 - CYCLE : -CYCLE])[1],
        "last year": then.expand_as(told),
    }
    return {name: rmse(forecast, told) for name, forecast in others.items()}


def _linear(h: Tensor, start: Tensor) -> Tensor:
    """h[i + 1] = A h[i] + b, fitted to (T, 2) and applied to (n, 2): (AHEAD, n, 2)."""

    def with_one(x: Tensor) -> Tensor:
        return torch.cat([x, torch.ones_like(x[:, :1])], 1)

    A = torch.linalg.lstsq(with_one(h[:-1]), h[1:]).solution
    steps = [start]
    for _ in range(AHEAD):
        steps.append(with_one(steps[-1]) @ A)
    return torch.stack(steps[1:])


def rmse(a: Tensor, b: Tensor) -> Tensor:
    """Root mean square difference over forecasts: two tensors of shape (AHEAD, n, 2) -> (AHEAD, 2)."""
    return (a - b).square().mean(1).sqrt()


def table(r: Result, years: Tensor) -> str:
    """The outcome in words and numbers, for a terminal."""
    span = _spans(years)
    stats = r.model.ode.stats
    assert stats is not None
    n = len(years) - SEEN - AHEAD + 1
    columns = [("training", r.fit), *((name, r.error(name)) for name in r.errors)]
    head = f"{'RMSE':<6}{'amplitude':>10}" + "".join(f"{name:>16}" for name, _ in columns)
    rows = []
    for i, name in enumerate(SPECIES):
        cells = (f"{f'{e[i]:.2f} ({e[i] / r.amplitude[i]:.0%})':>16}" for _, e in columns)
        rows.append(f"{name:<6}{r.amplitude[i]:>10.2f}" + "".join(cells))
    weights = sum(p.numel() for p in r.model.net.parameters())
    last, backward = r.history.loss[-1], sum(r.history.nfe_backward)
    return "\n".join(
        [
            "",
            "Hare and lynx pelts of the Hudson's Bay Company, thousands a year",
            f"trained on {span[0]}; then {n} forecasts of {AHEAD} years each in {span[1]}, which training never saw",
            f"(%) of the amplitude, half the range of {span[0]}; 'training' is the fit, the others are forecasts",
            "",
            head,
            "-" * len(head),
            *rows,
            "",
            "neural ODE    h' = net(h) and no more, for the scaled log-counts, one hidden layer of tanh",
            "linear model  of each year from the last, in logarithms, by least squares",
            f"last cycle    what was counted {CYCLE} years earlier",
            "last year     what was counted last",
            "",
            f"parameters  {weights} in the network",
            f"training    {len(r.history.loss)} iterations, last loss {last:.4f}, {r.wall:.1f} s",
            f"nfe         {sum(r.history.nfe)} forward, {backward or 'none needed'} backward in training, "
            f"{stats.nfe} for the {n} forecasts",
            f"solver      {stats.method}, adjoint={r.model.ode.solver_options['adjoint']}",
            f"engine      {stats.engine}: {stats.reason}; ready after {r.ready:.1f} s",
        ]
    )


def _spans(years: Tensor) -> tuple[str, str]:
    return f"{int(years[0])}-{int(years[SEEN - 1])}", f"{int(years[SEEN])}-{int(years[-1])}"


INK, MUTED, FAINT, SHADE = "#22262e", "#4a505c", "#b9bec9", "#eef0f4"
COLORS = ("#d9730d", "#1b6ca8")  # hare, lynx
ORBIT = "#c2334d"  # in the phase plane, where colours are free of species
# Who forecasts: the model stands out.
RIVALS = {"neural ODE": ORBIT, "linear model": "#6b4c9a", "last cycle": "#8a8f99", "last year": "#b9bec9"}
# A legend on the title's line, where it hides nothing.
ABOVE: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1), "handlelength": 1.6, "borderaxespad": 0.2}
STYLE = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.edgecolor": "#6d7380",
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}


def draw(canvas: Figure, r: Result, years: Tensor, pelts: Tensor) -> None:
    """Fill a figure: the forecasts in the record, the phase plane, and the errors by years ahead."""
    import matplotlib

    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        grid = canvas.add_gridspec(2, 3, height_ratios=(1, 1.05), width_ratios=(1.5, 1, 1))
        _draw_record(canvas.add_subplot(grid[0, :]), r.model, years, pelts)
        _draw_plane(canvas.add_subplot(grid[1, 0]), r.model, pelts)
        for i in range(len(SPECIES)):
            _draw_errors(canvas.add_subplot(grid[1, 1 + i]), r, i)
        error, rival = r.error("neural ODE"), r.error("last cycle")
        words = "A neural ODE learns the cycle of hare and lynx"
        if bool((error < rival).all()):
            less = float((1 - error / rival).min())
            words = f"A neural ODE forecasts hare and lynx, with {less:.0%} less error than the last cycle"
        canvas.suptitle(words, fontsize=18, fontweight="bold", x=0.012, ha="left")


def _draw_record(ax: Axes, model: Populations, years: Tensor, pelts: Tensor) -> None:
    split = float(years[SEEN - 1])
    ax.axvspan(split, float(years[-1]) + 1, color=SHADE, lw=0)
    ax.text(split - 0.5, 152, "training", va="top", ha="right", color=MUTED)
    ax.text(split + 0.5, 152, f"every fifth forecast of {AHEAD} years", va="top", color=MUTED)
    counted: dict[str, Any] = {"colors": COLORS, "lw": 1, "alpha": 0.65, "marker": "o", "ms": 3.5}
    plot.trajectory(ax, years, pelts, labels=[f"{s}, counted" for s in SPECIES], **counted)
    fine = torch.linspace(0, AHEAD, 51, dtype=years.dtype)
    starts = range(SEEN - 1, len(years) - AHEAD, AHEAD)
    for k, i in enumerate(starts):
        labels = [f"{s}, forecast" for s in SPECIES] if k == 0 else None
        plot.trajectory(ax, years[i] + fine, model.forecast(pelts[i], fine), colors=COLORS, lw=3, labels=labels)
    ax.set(
        title="The record",
        ylabel="pelts (thousands)",
        xlim=(float(years[0]) - 1, float(years[-1]) + 1),
        ylim=(0, 160),
    )
    ax.legend(**ABOVE, ncols=4, columnspacing=1.6)


def _draw_plane(ax: Axes, model: Populations, pelts: Tensor) -> None:
    def slope(t: Tensor, h: Tensor) -> Tensor:
        # The field of the pelts themselves: d exp(x) = exp(x) dx.
        return h * model.std * model.field(t, model.scaled(h))

    plot.vector_field(
        ax, slope, xlim=(1, 142), ylim=(1, 82), points=60, color=FAINT, density=1.0, linewidth=0.9, arrowsize=0.9
    )
    dots: dict[str, Any] = {"linestyle": "none", "marker": "o", "ms": 4, "color": INK, "alpha": 0.7}
    plot.phase_portrait(ax, pelts[:SEEN], label="training", **dots)
    # Where the field goes by itself, after so many years that the start is forgotten.
    course = model.forecast(pelts[:SEEN].log().mean(0).exp(), torch.linspace(0, 100, 2001, dtype=pelts.dtype))
    plot.phase_portrait(ax, course[1600:], color=ORBIT, lw=2.6, label="in the long run")
    ax.set(title="Learned field", xlabel="hare (thousands)", ylabel="lynx (thousands)")
    ax.legend(**ABOVE, ncols=2, columnspacing=1.0, handletextpad=0.5, fontsize=11)


def _draw_errors(ax: Axes, r: Result, i: int) -> None:
    ahead = torch.arange(1, AHEAD + 1)
    for name, errors in r.errors.items():
        width = 3.2 if name == "neural ODE" else 2
        plot.trajectory(
            ax, ahead, errors[:, i], colors=[RIVALS[name]], labels=[name], lw=width, marker="o", ms=5, clip_on=False
        )
    ax.set(title=f"Error, {SPECIES[i]}", xlabel="years ahead", xlim=(1, AHEAD), ylim=(0, None))
    ax.set_xticks(range(1, AHEAD + 1))
    if i == 0:
        ax.set_ylabel("RMSE (thousands)")
        ax.legend(loc="upper left", handlelength=1.4, borderaxespad=0.2, fontsize=10.5)
