"""`pyjlode demo`: a neural ODE learns the cycle of hare and lynx from sixteen years of the fur trade.

The model is a neural ODE and nothing else: a small network is the whole vector field, and nobody tells it who eats
whom.
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
from ..data import hudson_bay
from ..errors import BadOption
from ..methods import find
from ..nn import NeuralODE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SPECIES = ("hare", "lynx")
HELD_BACK = 5  # the last years, which training never sees: about a quarter of the record, half a cycle
CYCLE = 10  # years between the two peaks of the hare in the training years, 1903 and 1913


class Populations(nn.Module):
    """Pelts as a function of time: a neural ODE for the scaled logarithms of the counts.

    In logarithms no count can become negative, and a given error is the same fraction of a small count as of a large
    one, as is natural for trapping records. Scaled by mean and deviation, states and slopes are of order one, where a
    network is at home. The initial state is learnt with the field: the count of 1900 is no more exact than the rest.

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
        self.h0 = nn.Parameter(self.scaled(pelts[0]))
        self.ode = NeuralODE(self.field, return_trajectory=True, **solver_options)

    def field(self, t: Tensor, h: Tensor) -> Tensor:
        """dh/dt per year, for scaled log-counts `h` of shape (..., 2). The same in every year: `t` is not used."""
        return self.net(h)

    def forward(self, years: Tensor) -> Tensor:
        """Scaled log-counts, shape (T, 2), in `years`, shape (T,), of which the first is where `h0` stands."""
        return self.ode(self.h0, years)

    def scaled(self, pelts: Tensor) -> Tensor:
        """Thousands of pelts, shape (..., 2) -> scaled log-counts."""
        return (pelts.log() - self.mean) / self.std

    def pelts(self, h: Tensor) -> Tensor:
        """Scaled log-counts, shape (..., 2) -> thousands of pelts."""
        return (h * self.std + self.mean).exp()


@dataclass
class History:
    """What happened in training, one entry for each iteration.

    Attributes:
        loss: mean squared error of the scaled log-counts over the years in use.
        nfe, nfe_backward: evaluations of the field in the solve, and in its backward pass.
        years: how many years were in use.
    """

    loss: list[float] = field(default_factory=list)
    nfe: list[int] = field(default_factory=list)
    nfe_backward: list[int] = field(default_factory=list)
    years: list[int] = field(default_factory=list)


@dataclass
class Result:
    """The outcome of a demo. Errors and amplitudes are in thousands of pelts, shape (2,), hare first.

    Attributes:
        wall: time of the training, s.
        ready: time until two gradients were made, s: where Julia is set up, that starts it, and the field is compiled.
        amplitude: half the range of the training years.
        fit: root mean square error of the fitted curve in the training years.
        forecast: the same in the years held back.
        last_cycle, last_value: the same for two forecasts that need no model: what was counted ten years earlier, and
            what was counted in the last training year.
    """

    model: Populations
    history: History
    wall: float
    ready: float
    amplitude: Tensor
    fit: Tensor
    forecast: Tensor
    last_cycle: Tensor
    last_value: Tensor


def run(
    out: str | Path = "demo.png",
    *,
    seed: int = 0,
    adjoint: bool | str = True,
    method: str = "dopri5",
    engine: str = "auto",
    quick: bool = False,
) -> Result:
    """Fit a neural ODE to the Hudson Bay record, print a table, and write a picture.

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
    years, pelts = hudson_bay()
    seen = len(years) - HELD_BACK
    # The data are rough to a tenth; two or three digits from the solver are plenty to train with.
    options: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-3}
    if not find(method).adaptive:
        options["options"] = {"step_size": 0.25}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Populations(pelts[:seen], method=method, adjoint=adjoint, engine=engine, **options)
    for _ in range(2):  # a wrong method, adjoint or engine is said here, before there is a progress bar
        model(years[:2]).sum().backward()
    ready = time.perf_counter() - start
    start = time.perf_counter()
    history = train(model, years[:seen], pelts[:seen], iterations=100 if quick else 400)
    wall = time.perf_counter() - start

    with torch.no_grad():
        fitted = model.pelts(model(years))
    told = pelts[seen:]
    result = Result(
        model=model,
        history=history,
        wall=wall,
        ready=ready,
        amplitude=(pelts[:seen].amax(0) - pelts[:seen].amin(0)) / 2,
        fit=rmse(fitted[:seen], pelts[:seen]),
        forecast=rmse(fitted[seen:], told),
        last_cycle=rmse(pelts[seen - CYCLE : seen - CYCLE + HELD_BACK], told),
        last_value=rmse(pelts[seen - 1].expand_as(told), told),
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


def train(model: Populations, years: Tensor, pelts: Tensor, *, iterations: int) -> History:
    """Fit by AdamW. The fit begins with four years and takes in the others one by one over half of the iterations:
    asked for all years at once, a network tends to settle for a flat line through the cycles.

    Args:
        years: shape (T,).
        pelts: shape (T, 2), in thousands.
    """
    target = model.scaled(pelts)
    optimizer = torch.optim.AdamW(
        [{"params": model.net.parameters(), "weight_decay": 1e-3}, {"params": [model.h0], "weight_decay": 0.0}], lr=0.02
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations, eta_min=4e-4)
    history = History()
    bar = tqdm(range(iterations), desc="training", unit="it", dynamic_ncols=True)
    for i in bar:
        n = min(len(years), 4 + 2 * (len(years) - 3) * i // iterations)
        loss = (model(years[:n]) - target[:n]).square().mean()
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


def rmse(a: Tensor, b: Tensor) -> Tensor:
    """Root mean square difference over time: two tensors of shape (T, 2) -> shape (2,)."""
    return (a - b).square().mean(0).sqrt()


def table(r: Result, years: Tensor) -> str:
    """The outcome in words and numbers, for a terminal."""
    span = _spans(years)
    stats = r.model.ode.stats
    assert stats is not None
    columns = [
        (f"fit {span[0]}", r.fit),
        (f"forecast {span[1]}", r.forecast),
        (f"last {CYCLE} years again", r.last_cycle),
        ("last year again", r.last_value),
    ]
    head = f"{'RMSE':<6}{'amplitude':>11}" + "".join(f"{name:>21}" for name, _ in columns)
    rows = []
    for i, name in enumerate(SPECIES):
        cells = (f"{f'{e[i]:.2f} ({e[i] / r.amplitude[i]:.0%})':>21}" for _, e in columns)
        rows.append(f"{name:<6}{r.amplitude[i]:>11.2f}" + "".join(cells))
    weights = sum(p.numel() for p in r.model.net.parameters())
    last, backward = r.history.loss[-1], sum(r.history.nfe_backward)
    return "\n".join(
        [
            "",
            "Hare and lynx pelts of the Hudson's Bay Company, thousands a year",
            f"trained on {span[0]}; {span[1]} held back, then forecast; (%) of the amplitude, half the range of "
            f"{span[0]}",
            "",
            head,
            "-" * len(head),
            *rows,
            "",
            "model       h' = net(h) and no more: a pure neural ODE for the scaled log-counts, one hidden layer of "
            "tanh",
            f"parameters  {weights} in the network, {r.model.h0.numel()} for the state of {int(years[0])}",
            f"training    {len(r.history.loss)} iterations, last loss {last:.4f}, {r.wall:.1f} s",
            f"nfe         {sum(r.history.nfe)} forward, {backward or 'none needed'} backward in training, "
            f"{stats.nfe} for the solve of {int(years[0])}-{int(years[-1])}",
            f"solver      {stats.method}, adjoint={r.model.ode.solver_options['adjoint']}",
            f"engine      {stats.engine}: {stats.reason}; ready after {r.ready:.1f} s",
        ]
    )


def _spans(years: Tensor) -> tuple[str, str]:
    first, told, last = int(years[0]), int(years[-HELD_BACK]), int(years[-1])
    return f"{first}-{told - 1}", f"{told}-{last}"


INK, MUTED, FAINT, SHADE = "#22262e", "#4a505c", "#b9bec9", "#eef0f4"
COLORS = ("#d9730d", "#1b6ca8")  # hare, lynx
FORECAST = "#c2334d"  # in the phase plane, where colours are free of species
NFE = ("#6b4c9a", "#3aa6b9")  # forward, backward
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
    """Fill a figure: the fit over time, the phase plane, and how the training went."""
    import matplotlib

    seen = len(years) - HELD_BACK
    fine = torch.linspace(float(years[0]), float(years[-1]), 401, dtype=years.dtype)
    with torch.no_grad():
        curve = r.model.pelts(r.model(fine))
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        grid = canvas.add_gridspec(3, 2, height_ratios=(1.25, 0.62, 0.62), width_ratios=(1.1, 1))
        _draw_fit(canvas.add_subplot(grid[0, :]), years, pelts, fine, curve, seen)
        _draw_plane(canvas.add_subplot(grid[1:, 0]), r.model, pelts, fine <= years[seen - 1], curve, seen)
        above = canvas.add_subplot(grid[1, 1])
        _draw_training(above, canvas.add_subplot(grid[2, 1], sharex=above), r.history, seen)
        canvas.suptitle(
            "A neural ODE learns the cycle of hare and lynx", fontsize=18, fontweight="bold", x=0.012, ha="left"
        )


def _draw_fit(ax: Axes, years: Tensor, pelts: Tensor, fine: Tensor, curve: Tensor, seen: int) -> None:
    split = float(years[seen - 1])
    inside = fine <= split
    ax.axvspan(split, float(years[-1]) + 0.4, color=SHADE, lw=0)
    ax.text(split + 0.15, 86, "never seen in training:\nforecast dashed, counts open", va="top", color=MUTED)
    plot.trajectory(
        ax, fine[inside], curve[inside], colors=COLORS, lw=2.6, labels=[f"{s}, neural ODE" for s in SPECIES]
    )
    plot.trajectory(ax, fine[~inside], curve[~inside], colors=COLORS, lw=2.6, linestyle=(0, (2, 1.3)))
    plot.trajectory(
        ax,
        years[:seen],
        pelts[:seen],
        colors=COLORS,
        linestyle="none",
        marker="o",
        ms=7,
        mec="white",
        mew=0.8,
        labels=[f"{s}, counted" for s in SPECIES],
    )
    plot.trajectory(
        ax, years[seen:], pelts[seen:], colors=COLORS, linestyle="none", marker="o", ms=7, mfc="white", mew=1.8
    )
    ax.set(
        title="Counts and fit",
        xlabel="year",
        ylabel="pelts (thousands)",
        xlim=(1899.6, float(years[-1]) + 0.4),
        ylim=(0, 90),
    )
    ax.set_xticks(range(1900, 1921, 2))
    ax.legend(**ABOVE, ncols=4, columnspacing=1.6)


def _draw_plane(ax: Axes, model: Populations, pelts: Tensor, inside: Tensor, curve: Tensor, seen: int) -> None:
    def slope(t: Tensor, h: Tensor) -> Tensor:
        # The field of the pelts themselves: d exp(x) = exp(x) dx.
        return h * model.std * model.field(t, model.scaled(h))

    plot.vector_field(
        ax, slope, xlim=(2, 92), ylim=(2, 72), points=60, color=FAINT, density=1.15, linewidth=0.9, arrowsize=0.9
    )
    dots: dict[str, Any] = {"linestyle": "none", "marker": "o", "ms": 6.5}
    plot.phase_portrait(ax, curve[inside], color=INK, lw=2.4, label="fit")
    plot.phase_portrait(ax, pelts[:seen], **dots, color=INK, mec="white", mew=0.8, label="counts")
    plot.phase_portrait(ax, curve[~inside], color=FORECAST, lw=2.4, linestyle=(0, (2, 1.3)), label="forecast")
    plot.phase_portrait(ax, pelts[seen:], **dots, color=FORECAST, mfc="white", mew=1.6, label="held back")
    ax.set(title="Learned field", xlabel="hare pelts (thousands)", ylabel="lynx pelts (thousands)")
    ax.legend(**ABOVE, ncols=4, columnspacing=1.0, handletextpad=0.5, fontsize=11)


def _draw_training(above: Axes, below: Axes, history: History, seen: int) -> None:
    i = torch.arange(1, len(history.loss) + 1)
    plot.trajectory(above, i, torch.tensor(history.loss), colors=[INK], lw=1.6)
    above.set(title="Training", ylabel="loss", yscale="log")
    above.tick_params(labelbottom=False)
    counts = {"forward": history.nfe, "backward": history.nfe_backward}
    for (name, nfe), color in zip(counts.items(), NFE):
        name = name if any(nfe) else f"{name}: none needed"
        plot.trajectory(below, i, torch.tensor(nfe), colors=[color], labels=[name], lw=1.8, clip_on=False)
    below.set(xlabel="iteration", ylabel="calls of the field", xlim=(0, len(i)))
    below.set_ylim(0, 1.5 * max(map(max, counts.values())))  # room for the legend
    below.legend(loc="upper left", ncols=2, handlelength=1.6, borderaxespad=0.2)
    full = history.years.index(seen) + 1
    for ax in (above, below):
        ax.axvline(full, ymax=0.72 if ax is below else 1, color=FAINT, lw=1.2, zorder=0)
    above.annotate(
        f"from here on all {seen} years",
        xy=(full, 1),
        xycoords=("data", "axes fraction"),
        xytext=(6, -2),
        textcoords="offset points",
        va="top",
        color=MUTED,
    )
    above.figure.align_ylabels([above, below])
