"""python -m nanopost.plot: the curves of one run or of several, as a PNG.

    python -m nanopost.plot out/grpo
    python -m nanopost.plot out/grpo out/ppo --metrics reward kl --smooth 10 --out both.png

Without --metrics there is a panel for each metric that matters for the algorithms there are. A run
has one colour in all panels. Faint lines are the steps themselves, strong ones a running mean, over
as many steps for all runs, and markers the held-out evaluations. Alarms are ticks at the top, named
in the panel at the bottom. The PNG of one run is OUT/curves.png; that of several, curves.png in the
folder that holds them all.
"""

import importlib.util
import json
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanopost import InputError, alarms, cli, hf
from nanopost.cli import at_least, command
from nanopost.terminal import say


class Panel(NamedTuple):
    """What one panel has: of each tuple, the first metric that a run has."""

    solid: tuple[str, ...]
    dashed: tuple[str, ...] = ()
    markers: tuple[str, ...] = ()  # held out
    hollow: tuple[str, ...] = ()  # held out, greedy answers
    log: bool = False


PANELS = [
    Panel(("reward", "objective/scores"), (), ("eval/accuracy",), ("eval/greedy",)),
    Panel(("accuracy",), (), ("eval/accuracy",)),
    Panel(("rewards/accuracies",), (), ("eval/rewards/accuracies",)),
    Panel(("rewards/chosen",), ("rewards/rejected",)),
    Panel(("rewards/margins", "margin"), (), ("eval/rewards/margins", "eval/margin")),
    Panel(("reward_std",)),
    Panel(("frac_reward_zero_std", "ties"), ("completions/duplicate_ratio",)),
    Panel(("divergence",), (), ("eval/divergence",)),
    Panel(("loss",), (), ("eval/loss",)),
    Panel(("kl", "objective/kl", "policy/approxkl_avg"), (), ("eval/kl",), log=True),
    Panel(("policy/entropy_avg", "entropy"), (), ("eval/entropy",)),
    Panel(("completions/mean_length",)),
    Panel(("tools/call_frequency",), ("tools/failure_frequency",)),
    Panel(("completions/clipped_ratio",), ("completions/unrewarded",)),
    Panel(("clip_ratio/region_mean", "policy/clipfrac_avg", "cispo_clip_ratio")),
    Panel(("val/explained_variance",), log=True),
    Panel(("loss/value_avg",)),
    Panel(("experts/max_violation",), ("experts/unused_ratio",)),
    Panel(("experts/replay_changed",)),
    Panel(("sampling/sampling_logp_difference/mean",), log=True),
    Panel(("grad_norm",), log=True),
    Panel(("lr",)),
    Panel(("tokens_per_second",)),
]
COLOURS = [
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#7f7f7f",
]  # Okabe, Ito
COLUMNS = 4
GREY = "#666666"
LARGEST = sys.float_info.max


class Curves(NamedTuple):
    """A run, to be drawn."""

    label: str
    columns: dict[str, dict[int, float]]  # metric -> {step: value}; NaN is a gap
    alarms: list[dict]


# ------------------------------------------------------------------------------------------ reading
def read(folder, label: str) -> Curves:
    """A run's metrics and alarms. What cannot be read is counted and said. InputError if there is
    no run."""
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        hint = hf.inside(folder, "metrics.jsonl") or "name the --out of a run"
        raise InputError(f"{folder} holds no metrics.jsonl; {hint}.")
    lines, damaged = _lines(path)
    columns, infinite = {}, {}
    for line in lines:
        for name, value in line.items():
            if name == "step" or isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if not abs(value) <= LARGEST:  # nan too, and an int that is no float
                infinite[name] = infinite.get(name, 0) + 1
                value = math.nan
            columns.setdefault(name, {})[line["step"]] = float(value)
    if damaged:
        say(f"{path}: {damaged} damaged line{'s' * (damaged > 1)} left out")
    for name, count in infinite.items():
        say(f"{path}: {name} is not finite in {count} step{'s' * (count > 1)}: a gap")
    if not columns:
        raise InputError(f"{path} holds no step yet: wait for the run's first.")
    log = Path(folder) / "alarms.jsonl"
    if log.is_file():
        sounded, damaged = _lines(log, "alarm")
        if damaged:
            say(f"{log}: {damaged} damaged line{'s' * (damaged > 1)} left out")
    else:  # of an older run
        sounded = alarms.of(lines)
    return Curves(label, columns, sounded)


def _lines(path, text_of: str | None = None) -> tuple[list[dict], int]:
    """-> (whole lines that have a step, and such a text, how many have not)."""
    found, damaged = [], 0
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if _has_step(line) and (text_of is None or isinstance(line.get(text_of), str)):
            found.append(line)
        else:
            damaged += 1
    return found, damaged


def _has_step(line) -> bool:
    step = line.get("step") if isinstance(line, dict) else None
    return isinstance(step, int) and not isinstance(step, bool) and abs(step) < 2**53


def labels(folders: list[str]) -> list[str]:
    """Short names that tell folders apart."""
    paths = [os.path.abspath(folder) for folder in folders]
    if len(set(paths)) < len(paths):
        raise InputError("a run is named twice: name each once.")
    if len(paths) == 1:
        return [os.path.basename(paths[0])]
    return [os.path.relpath(path, os.path.commonpath(paths)) for path in paths]


def place(folders: list, name: str) -> Path:
    """Where what is made of these runs goes: of one, to its folder; of several, to the folder that
    holds them all, where it replaces no run's own."""
    if len(folders) == 1:
        return Path(folders[0], name)
    parents = [os.path.dirname(os.path.abspath(folder)) for folder in folders]
    return Path(os.path.commonpath(parents), name)


def panels(runs: list[Curves], metrics: list[str] | None) -> list[Panel]:
    """Those to draw. InputError for a metric that no run has."""
    present = {name for run in runs for name in run.columns}
    if metrics:
        for name in metrics:
            without = [run.label for run in runs if name not in run.columns]
            if len(without) == len(runs):
                shown = ", ".join(sorted(present - {"time/elapsed"}))
                raise InputError(f"--metrics {name}: no run has it; there are {shown}.")
            if without:
                say(f"{name}: not in {', '.join(without)}")
        return [Panel((name,)) for name in metrics]
    chosen = []
    for panel in PANELS:
        if not present.intersection(panel.solid):
            continue
        if panel.solid == ("loss",) and not any(map(_loss_means_something, runs)):
            continue
        chosen.append(panel)
    if chosen:
        return chosen
    # A run that has only been evaluated, or that logs names of its own.
    others = sorted(name for name in present if not name.startswith("time/"))
    return [Panel((name,)) for name in others or sorted(present)]


def _loss_means_something(run) -> bool:
    """That of a policy gradient does not fall as the policy gets better."""
    return "loss" in run.columns and (
        "reward" not in run.columns or "rewards/chosen" in run.columns
    )


# ------------------------------------------------------------------------------------------ drawing
def running_mean(values: list[float], n: int) -> list[float]:
    """The mean of the last n values at each place, of those that are no NaN; NaN where one is."""
    x = np.asarray(values, float)
    there = ~np.isnan(x)
    n = min(n, len(x))
    with np.errstate(over="ignore"):
        means = _window_sums(np.where(there, x, 0.0), n) / np.maximum(1, _window_sums(there, n))
    return np.where(there, means, np.nan).tolist()


def _window_sums(x_N, n: int):
    """The sum of the last n at each place, in O(N): a window is the end of a block of n and the
    beginning of the next. (In differences of sums from the start, all would drown in one spike.)"""
    blocks = np.pad(x_N.astype(float), (n - 1, -(len(x_N) + n - 1) % n)).reshape(-1, n)
    ends = blocks[:, ::-1].cumsum(1)[:, ::-1].ravel()  # of each place, to the end of its block
    begins = blocks.cumsum(1).ravel()
    last = np.arange(n - 1, n - 1 + len(x_N))
    whole = (last + 1) % n == 0  # the window is a block
    return np.where(whole, 0.0, ends[last - n + 1]) + begins[last]


def figure_of(runs: list[Curves], chosen: list[Panel], smooth: int | None = None):
    """-> matplotlib's Figure. smooth: steps of the running mean, in which a metric that is not
    logged every step has fewer points; None: a fortieth of the longest run."""
    from matplotlib import pyplot as plt

    if smooth is None:
        spans = [_span(points) for run in runs for points in run.columns.values()]
        smooth = max(1, max(spans) // 40)
    colours = {
        run.label: COLOURS[i] if len(runs) <= len(COLOURS) else plt.cm.turbo(i / (len(runs) - 1))
        for i, run in enumerate(runs)
    }
    names = sorted({alarm["alarm"] for run in runs for alarm in run.alarms})
    columns = min(COLUMNS, max(1, math.ceil(math.sqrt(len(chosen)))))
    rows = math.ceil(len(chosen) / columns)
    strip = 0.24 * len(names) + 0.5 if names else 0.0
    style = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": GREY,
        "axes.grid": True,
        "grid.color": "#e6e6e6",
        "xtick.color": GREY,
        "ytick.color": GREY,
        "axes.axisbelow": True,
    }
    with plt.rc_context(style):
        width = max(7.0, 4.4 * columns)
        figure = plt.figure(figsize=(width, 2.6 * rows + strip + 0.7), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.1, w_pad=0.08)
        grid = figure.add_gridspec(
            rows + bool(names), columns, height_ratios=[2.6] * rows + [strip] * bool(names)
        )
        last = max(max(steps) for run in runs for steps in run.columns.values())
        for i, panel in enumerate(chosen):
            axis = figure.add_subplot(grid[divmod(i, columns)])
            _draw_panel(axis, panel, runs, colours, smooth)
            axis.set_xlim(0, max(1, last))
        if names:
            axis = figure.add_subplot(grid[rows, :])
            _draw_alarms(axis, names, runs, colours)
            axis.set_xlim(0, max(1, last))
        handles = [plt.Line2D([], [], color=colours[run.label], linewidth=2.5) for run in runs]
        legend = figure.legend(
            handles,
            [run.label for run in runs],
            loc="outside upper left",
            ncols=max(1, int(width / (0.6 + 0.085 * max(len(run.label) for run in runs)))),
            frameon=False,
            fontsize=10,
        )
        _as_they_are(legend.get_texts())
        return figure


def _as_they_are(texts):
    """Names of runs, metrics and alarms: a $ in them begins no formula."""
    for text in texts:
        text.set_parse_math(False)


def _first(names, run) -> str | None:
    return next((name for name in names if name in run.columns), None)


def _draw_panel(axis, panel, runs, colours, smooth):
    titles, others = {}, {}  # names of metrics, and, for the legend, style of what else there is
    for run in runs:
        colour = colours[run.label]
        if solid := _first(panel.solid, run):
            titles[solid] = None
            _draw_curve(axis, run.columns[solid], "-", colour, 1 if solid == "lr" else smooth)
        dashed = _first(panel.dashed, run)
        if dashed and any(run.columns[dashed].values()):
            others[dashed.split("/")[-1]] = {"linestyle": "--"}
            _draw_curve(axis, run.columns[dashed], "--", colour, smooth)
        for names, what, face in (
            (panel.markers, "held out", colour),
            (panel.hollow, "greedy", "white"),
        ):
            if name := _first(names, run):
                marks = {"marker": "o", "markersize": 5, "linestyle": ":", "linewidth": 0.8}
                steps, values = list(run.columns[name]), list(run.columns[name].values())
                axis.plot(steps, values, color=colour, mfc=face, **marks, clip_on=False)
                others[what] = {**marks, "mfc": "white" if face == "white" else GREY}
        for alarm in run.alarms:
            axis.axvline(alarm["step"], 0.93, 1.0, color=colour, linewidth=2)
    _scale(axis, panel, runs)
    title = " · ".join(titles)
    size = min(10.0, (200 if others else 400) / len(title))  # or it would run into what is beside
    _as_they_are([axis.set_title(title, loc="left", fontsize=size, fontweight="bold")])
    if others:
        from matplotlib.lines import Line2D

        legend = axis.legend(
            [Line2D([], [], color=GREY, **style) for style in others.values()],
            list(others),
            loc="lower right",
            bbox_to_anchor=(1.02, 0.98),
            ncols=len(others),
            fontsize=8,
            frameon=False,
            handlelength=1.6,
            handletextpad=0.4,
            columnspacing=0.9,
        )
        _as_they_are(legend.get_texts())


def _span(points) -> int:
    """Steps from the first point to the last, both counted."""
    return max(points) - min(points) + 1


def _draw_curve(axis, points, style, colour, smooth):
    steps, values = list(points), list(points.values())
    n = max(1, round(smooth * len(points) / _span(points)))  # points in so many steps
    if n > 1:
        axis.plot(steps, values, style, color=colour, linewidth=0.8, alpha=0.25)
    few = {"marker": "."} if len(steps) < 3 else {}
    axis.plot(steps, running_mean(values, n), style, color=colour, linewidth=1.6, **few)


def _scale(axis, panel, runs):
    """Logarithmic, if it may be, where the largest value would flatten all others."""
    names = (*panel.solid, *panel.markers)
    columns = [run.columns.get(name, {}) for run in runs for name in names]
    values = [x for column in columns for x in column.values() if x == x]
    sizes = sorted(abs(x) for x in values if x)
    if panel.log and sizes and sizes[-1] > 100 * sizes[len(sizes) // 2]:
        if min(values) > 0:
            axis.set_yscale("log")
        else:
            # Linear around 0 up to a power of ten: below one, ticks would run into each other.
            power = math.ceil(math.log10(sizes[len(sizes) // 2]))
            axis.set_yscale("symlog", linthresh=10.0**power)
    else:
        axis.yaxis.set_major_formatter(lambda x, _: f"{x:.10g}")


def _draw_alarms(axis, names, runs, colours):
    """A row for each alarm, a tick for each time it sounded."""
    for run in runs:
        for alarm in run.alarms:
            row = names.index(alarm["alarm"])
            axis.plot(alarm["step"], row, "|", color=colours[run.label], ms=11, mew=2.5)
    axis.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    _as_they_are(axis.get_yticklabels())
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_title("alarms", loc="left", fontsize=10, fontweight="bold")
    axis.set_xlabel("step")


# --------------------------------------------------------------------------------------------- main
def parsed(arguments=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="OUT", help="folders of runs")
    add(
        "--out",
        metavar="FILE.png",
        help="default: curves.png in OUT; of several, in the folder of all",
    )
    add("--metrics", nargs="+", metavar="NAME", help="these alone, a panel each")
    add(
        "--smooth",
        type=at_least(1),
        help="steps in a running mean; 1: none; default: a fortieth of the longest run",
    )
    return parser.parse_args(arguments)


def main(arguments=None):
    args = parsed(arguments)
    runs = [read(folder, label) for folder, label in zip(args.runs, labels(args.runs))]
    out = Path(args.out or place(args.runs, "curves.png"))
    if out.suffix != ".png":
        raise InputError(f"--out {out}: it is a PNG: end the name in .png.")
    if not out.absolute().parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {out.parent}: create it first.")
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or spec.loader is None:  # a mere folder of that name
        raise InputError("nanopost.plot needs the package matplotlib: pip install matplotlib.")
    import matplotlib

    matplotlib.use("Agg")  # no window
    if os.path.exists(out) and (args.out or len(runs) > 1):
        say(f"replaces {out}, which was there")
    figure = figure_of(runs, panels(runs, args.metrics), args.smooth)
    try:
        figure.savefig(out, dpi=110)
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}: choose another.") from error
    say(f"the curves are in {out}")


if __name__ == "__main__":
    command(main)
