"""nanopost.plot: what is drawn are the numbers of the logs, and what is damaged is told."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot
import numpy as np
import pytest
from scripts import ENVIRONMENT, ROOT

from nanopost import InputError, alarms
from nanopost.plot import PANELS, Panel, figure_of, labels, main, panels, place, read, running_mean

matplotlib.use("Agg")
STEPS = 60


def grpo(step, scale=1.0):
    line = {
        "step": step,
        "reward": scale * step / STEPS,
        "reward_std": 0.3,
        "frac_reward_zero_std": 0.1,
        "entropy": 1 / step,
        "loss": 0.0,
        "completions/mean_length": 40 + step,
        "completions/clipped_ratio": 0.0,
        "completions/unrewarded": 0.0,
        "grad_norm": 10.0 ** (step % 4),
        "lr": 1e-5 * step,
        "time/elapsed": float(step),
    }
    if step % 20 == 0:
        line |= {"eval/accuracy": 0.5, "eval/greedy": 0.6}
    return line


def dpo(step):
    return {
        "step": step,
        "loss": 0.7 - step / 200,
        "rewards/chosen": -step / 100,
        "rewards/rejected": -step / 50,
        "rewards/accuracies": 0.5,
        "rewards/margins": step / 100,
        "eval/loss": 0.6,
        "entropy": 1.0,
        "grad_norm": 1.0,
    }


def ppo(step):
    names = {"objective/scores": 0.5, "policy/entropy_avg": 0.1, "policy/clipfrac_avg": 0.1}
    names["val/explained_variance"] = -80.0 / step**2 if step < 15 else 0.04 * (-1) ** step
    return {"step": step, **names, "policy/approxkl_avg": 10.0 ** (step % 5), "eval/accuracy": 0.5}


def online(step):
    line = grpo(step) | dpo(step) | {"ties": 0.1, "eval/kl": (step % 9) / 9, "kl": 10.0**-step}
    line |= {"clip_ratio/region_mean": 0.1, "completions/duplicate_ratio": 0.4}
    del line["frac_reward_zero_std"]
    return line


def write(folder, lines, sounded=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if sounded is not None:
        (folder / "alarms.jsonl").write_text("".join(json.dumps(x) + "\n" for x in sounded))
    return str(folder)


@pytest.fixture(autouse=True)
def closed():
    yield
    matplotlib.pyplot.close("all")


@pytest.fixture
def one(tmp_path):
    return write(tmp_path / "grpo", [grpo(step) for step in range(1, STEPS + 1)], [])


@pytest.fixture
def other(tmp_path):
    return write(tmp_path / "dpo", [dpo(step) for step in range(1, STEPS + 1)], [])


def axes_of(figure):
    """{title: axis}."""
    return {axis.get_title(loc="left"): axis for axis in figure.axes}


def lines_of(axis, style="-", width=1.6):
    return [x for x in axis.lines if x.get_linestyle() == style and x.get_linewidth() == width]


def drawn(*folders, metrics=None, smooth=None):
    runs = [read(folder, label) for folder, label in zip(folders, labels(list(folders)))]
    return figure_of(runs, panels(runs, metrics), smooth)


# ------------------------------------------------------------------------------------ what is drawn
def test_curves_are_the_numbers_of_the_log(one):
    axes = axes_of(drawn(one, smooth=1))
    (curve,) = lines_of(axes["reward"])
    assert list(curve.get_xdata()) == list(range(1, STEPS + 1))
    assert list(curve.get_ydata()) == [step / STEPS for step in range(1, STEPS + 1)]
    marked = [x for x in axes["reward"].lines if x.get_marker() == "o"]
    assert [(list(x.get_xdata()), list(x.get_ydata())) for x in marked] == [
        ([20, 40, 60], [0.5] * 3),
        ([20, 40, 60], [0.6] * 3),
    ]
    names = [text.get_text() for text in axes["reward"].get_legend().get_texts()]
    assert names == ["held out", "greedy"]


def test_each_algorithm_has_the_panels_that_matter_to_it(one, other):
    assert list(axes_of(drawn(one))) == [
        *("reward", "reward_std", "frac_reward_zero_std", "entropy", "completions/mean_length"),
        *("completions/clipped_ratio", "grad_norm", "lr"),
    ]
    assert list(axes_of(drawn(other))) == [
        *("rewards/accuracies", "rewards/chosen", "rewards/margins", "loss", "entropy"),
        "grad_norm",
    ]
    chosen = axes_of(drawn(other))["rewards/chosen"]
    assert len(lines_of(chosen)) == len(lines_of(chosen, "--")) == 1


def test_panels_are_made_of_metrics_that_scripts_log():
    logged = "\n".join(
        path.read_text()
        for path in [*ROOT.glob("train_*.py"), *ROOT.glob("nanopost/*.py")]
        if path.name != "plot.py" and path.name != "alarms.py"
    )
    for panel in PANELS:
        for name in (*panel.solid, *panel.dashed, *panel.markers, *panel.hollow):
            last = name.removeprefix("eval/")
            assert last in logged or last.split("/")[-1] in logged, name


def test_runs_have_a_colour_each_in_all_panels(one, other):
    figure = drawn(one, other)
    handles = figure.legends[0].legend_handles
    first, second = [x.get_color() for x in handles]
    assert first != second and [x.get_text() for x in figure.legends[0].texts] == ["grpo", "dpo"]
    axes = axes_of(figure)
    assert {x.get_color() for x in axes["reward"].lines} == {first}
    assert {x.get_color() for x in axes["rewards/margins"].lines} == {second}
    assert [x.get_color() for x in lines_of(axes["entropy"])] == [first, second]
    many = [write(Path(one).parent / f"r{i}", [grpo(1)]) for i in range(12)]
    colours = [tuple(x.get_color()) for x in drawn(*many).legends[0].legend_handles]
    assert len(set(colours)) == 12


def test_alarms_are_ticks_with_their_names_below(tmp_path):
    lines = [grpo(step) for step in range(1, STEPS + 1)]
    sounded = [
        {"step": 17, "alarm": "kl_exploding", "since": 9, "message": "a"},
        {"step": 50, "alarm": "kl_exploding", "since": 41, "message": "b"},
        {"step": 30, "alarm": "reward_constant", "since": 26, "message": "c"},
    ]
    axes = axes_of(drawn(write(tmp_path / "run", lines, sounded)))
    ticks = sorted(x.get_xdata()[0] for x in axes["reward"].lines if list(x.get_ydata())[1] == 1.0)
    assert ticks == [17, 30, 50]
    strip = axes["alarms"]
    assert [x.get_text() for x in strip.get_yticklabels()] == ["kl exploding", "reward constant"]
    marks = sorted((x.get_xdata()[0], x.get_ydata()[0]) for x in strip.lines)
    assert marks == [(17, 0), (30, 1), (50, 0)]


def test_the_alarms_of_a_run_that_has_no_log_of_them_are_computed(tmp_path):
    lines = [grpo(step) | {"reward": 0.5, "reward_std": 0.0} for step in range(1, STEPS + 1)]
    found = read(write(tmp_path / "run", lines), "run").alarms
    assert found == alarms.of(lines) and found[0]["alarm"] == "reward_constant"


@pytest.mark.parametrize("count", [1, 7])
def test_nothing_lies_on_anything_else(tmp_path, count):
    """Titles, legends, numbers and the names of alarms, with long names of runs."""
    sounded = [
        {"step": 5 + i, "alarm": name, "since": 1, "message": ""}
        for i, name in enumerate(alarms.ALARMS)
    ]
    folders = []
    for i in range(count):
        kind = (grpo, dpo, ppo, online)[i % 4]
        lines = [kind(step) for step in range(1, STEPS + 1)]
        folders.append(write(tmp_path / f"a-rather-long-name-of-a-run-{i}", lines, sounded))
    figure = drawn(*folders)
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    boxes = {"legend": figure.legends[0].get_window_extent(renderer)}
    for title, axis in axes_of(figure).items():
        boxes[f"title {title}"] = axis._left_title.get_window_extent(renderer)
        boxes[f"axis {title}"] = axis.get_window_extent(renderer)
        if axis.get_legend():
            boxes[f"legend {title}"] = (
                axis.get_legend().legend_handles[0].get_window_extent(renderer)
            )
        low, high = sorted(axis.get_ylim())
        for label in axis.get_yticklabels():
            if low <= label.get_position()[1] <= high:
                boxes[f"{label.get_text()} of {title}"] = label.get_window_extent(renderer)
    width, height = figure.canvas.get_width_height()
    names = list(boxes)
    for i, name in enumerate(names):
        box = boxes[name]
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width + 1 and box.y1 <= height + 1, name
        for another in names[:i]:
            assert not box.overlaps(boxes[another]), f"{name} lies on {another}"
    if count > 1:
        assert axes_of(figure)["val/explained_variance"].get_yscale() == "symlog"


def test_a_running_mean_is_of_the_last_steps_without_gaps():
    values = np.random.default_rng(0).normal(size=50).tolist()
    expected = [np.mean(values[max(0, i - 6) : i + 1]) for i in range(50)]
    assert running_mean(values, 7) == pytest.approx(expected)
    assert running_mean(values, 1) == values
    gap = running_mean([1.0, math.nan, 3.0, 5.0], 3)
    assert gap[0] == 1.0 and math.isnan(gap[1]) and gap[2:] == [2.0, 4.0]
    assert running_mean([1.0, 3.0], 10**12) == [1.0, 2.0]
    assert running_mean([1.5e308, -1.5e308], 1) == [1.5e308, -1.5e308]
    values[7], values[20] = math.nan, 1e30  # after which the others are what they were
    for n in (1, 2, 5, 10, 49, 50, 51):
        windows = [values[max(0, i - n + 1) : i + 1] for i in range(50)]
        expected = [math.nan if i == 7 else np.nanmean(x) for i, x in enumerate(windows)]
        assert running_mean(values, n) == pytest.approx(expected, nan_ok=True), n


def test_a_running_mean_of_a_long_run_takes_no_time():
    values = np.random.default_rng(0).normal(size=400_000).tolist()
    began = time.perf_counter()
    means = running_mean(values, 10_000)
    assert time.perf_counter() - began < 2.0  # slice by slice: minutes
    assert means[-1] == pytest.approx(np.mean(values[-10_000:]))


# ------------------------------------------------------------------------------ what cannot be read
def test_damaged_lines_and_what_is_no_number_are_counted(tmp_path, capsys):
    folder = write(tmp_path / "run", [grpo(step) for step in range(1, 9)], [])
    with open(f"{folder}/metrics.jsonl", "a") as file:
        file.write('[1]\nnull\n{"loss": 1}\n{"step": "9"}\n')
        file.write(
            f'{{"step": 9{"0" * 30}, "loss": 1}}\n{{"step": 8, "grad_norm": 1{"0" * 400}}}\n'
        )
        file.write('{"step": 9, "reward": NaN, "loss": Infinity, "text": "x", "flag": true}\n')
        file.write('{"step": 10, "rew')
    with open(f"{folder}/alarms.jsonl", "a") as file:
        file.write('{"step": 3}\n{"step": 3, "alarm": 5}\n')
    run = read(folder, "run")
    assert list(run.columns["reward"]) == list(range(1, 10))
    assert math.isnan(run.columns["reward"][9]) and not {"text", "flag"} & run.columns.keys()
    said = capsys.readouterr().out
    assert "metrics.jsonl: 6 damaged lines left out" in said
    assert "reward is not finite in 1 step: a gap" in said
    assert "grad_norm is not finite in 1 step: a gap" in said
    assert "alarms.jsonl: 2 damaged lines left out" in said
    figure_of([run], panels([run], None), None).canvas.draw()


def test_a_metric_that_some_runs_lack_is_told_and_one_that_all_lack_is_an_error(one, other, capsys):
    axes = axes_of(drawn(one, other, metrics=["reward", "entropy"]))
    assert list(axes) == ["reward", "entropy"]
    assert "reward: not in dpo" in capsys.readouterr().out
    with pytest.raises(InputError, match="--metrics wrong: no run has it; there are .*reward_std"):
        drawn(one, other, metrics=["wrong"])


@pytest.mark.parametrize("lines", [[], [{"step": 0}]])
def test_a_run_that_has_logged_nothing_is_a_sentence(tmp_path, lines):
    with pytest.raises(InputError, match="holds no step yet: wait for the run's first"):
        read(write(tmp_path / "run", lines), "run")


def test_a_run_that_has_only_been_evaluated_is_drawn(tmp_path, one):
    line = {"step": 0, "eval/loss": 1.0, "eval/entropy": 0.5, "time/elapsed": 1.0}
    folder = write(tmp_path / "run", [line])
    axes = axes_of(drawn(folder))
    assert list(axes) == ["eval/entropy", "eval/loss"]
    assert list(lines_of(axes["eval/loss"])[0].get_ydata()) == [1.0]
    assert list(axes_of(drawn(write(tmp_path / "mine", [{"step": 0, "foo": 1.0}])))) == ["foo"]
    assert "reward" in axes_of(drawn(folder, one))


def test_a_name_is_no_formula(tmp_path):
    """Of a run, a metric, an alarm: $ begins one in matplotlib, and _ hides a line."""
    names = ["lr$1e-6^{$", "run_$x$", "_run", r"a\b$^$"]
    metric = "eval/accuracy/regex:^a$|^{b$"
    sounded = [{"step": 1, "alarm": "of_$a^{fork$", "since": 1, "message": ""}]
    folders = [write(tmp_path / name, [grpo(1) | {metric: 0.5}], sounded) for name in names]
    figure = drawn(*folders, metrics=[metric])
    figure.canvas.draw()
    assert [text.get_text() for text in figure.legends[0].texts] == names
    texts = [*figure.legends[0].texts, *figure.axes[0].texts, figure.axes[0]._left_title]
    texts += figure.axes[1].get_yticklabels()
    assert "of $a^{fork$" in [text.get_text() for text in texts]
    assert not any(text.get_parse_math() for text in texts)


def test_one_step_is_a_point(tmp_path):
    axes = axes_of(drawn(write(tmp_path / "run", [grpo(1)])))
    assert lines_of(axes["reward"])[0].get_marker() == "."


def test_labels_tell_folders_apart():
    assert labels(["out/grpo/"]) == ["grpo"]
    assert labels(["out/a", "out/b/c"]) == ["a", "b/c"]
    assert labels(["x/run", "y/run"]) == ["x/run", "y/run"]
    with pytest.raises(InputError, match="named twice"):
        labels(["out/a", "out/../out/a"])


# -------------------------------------------------------------------------------------- the command
def test_the_command_writes_a_png_where_it_is_told(one, other, tmp_path, capsys):
    from matplotlib import image

    main([one, "--metrics", "reward"])
    main([one, other, "--metrics", "loss"])
    main([one, "--out", str(tmp_path / "mine.png"), "--metrics", "reward", "--smooth", "5"])
    said = capsys.readouterr().out
    assert "replaces" not in said
    for path in (f"{one}/curves.png", tmp_path / "curves.png", tmp_path / "mine.png"):
        assert f"the curves are in {path}" in said
        pixels = image.imread(path)
        assert min(pixels.shape[:2]) > 200 and pixels[..., :3].std() > 0.02


def test_a_picture_of_several_runs_replaces_none_of_one(one, other, tmp_path, capsys):
    """Not even where a run is in another's folder; and what is replaced is said."""
    inner = write(Path(one) / "inner", [grpo(1)])
    assert place([one], "x.png") == Path(one, "x.png")
    for runs in ([one, other], [one, inner], [f"{other}/", one, inner]):
        assert place(runs, "x.png") == tmp_path / "x.png"
    main([one, "--metrics", "reward"])
    own = Path(one, "curves.png").read_bytes()
    main([one, inner, "--metrics", "reward"])
    assert Path(one, "curves.png").read_bytes() == own
    main([one, "--metrics", "reward"])
    assert "replaces" not in capsys.readouterr().out
    picture = tmp_path / "curves.png"
    for flags in ([one, other], [one, "--out", str(picture)]):
        main([*flags, "--metrics", "grad_norm"])
        assert f"replaces {picture}, which was there\n" in capsys.readouterr().out


def test_runs_in_a_picture_are_smoothed_alike(tmp_path):
    """Over a fortieth of the longest one's steps, whatever the length of the others."""
    draw = np.random.default_rng(0)
    values = {name: draw.normal(size=size).tolist() for name, size in [("a", 400), ("b", 90)]}
    folders = []
    for name, rewards in values.items():
        lines = [{"step": i + 1, "reward": reward} for i, reward in enumerate(rewards)]
        folders.append(write(tmp_path / name, lines, []))
    curves = lines_of(axes_of(drawn(*folders))["reward"])
    for curve, rewards in zip(curves, values.values(), strict=True):
        expected = [np.mean(rewards[max(0, i - 9) : i + 1]) for i in range(len(rewards))]
        assert curve.get_ydata() == pytest.approx(expected)


def test_a_window_is_of_steps_whatever_is_logged_in_them(tmp_path):
    """Evaluations, of which no two are in a window, stay as they are, as do few late ones."""
    draw = np.random.default_rng(0)
    every = {"reward": range(1, 401), "eval/loss": range(0, 401, 40), "loss": range(5, 401, 5)}
    every["late"] = range(301, 401)
    values = {name: {step: draw.normal() for step in steps} for name, steps in every.items()}
    lines = [
        {"step": step, **{name: at[step] for name, at in values.items() if step in at}}
        for step in range(401)
    ]
    folder = write(tmp_path / "run", lines, [])
    axes = axes_of(drawn(folder, metrics=list(every), smooth=10))
    for name, points in {"reward": 10, "eval/loss": 1, "loss": 2, "late": 10}.items():
        x = list(values[name].values())
        expected = [np.mean(x[max(0, i - points + 1) : i + 1]) for i in range(len(x))]
        (curve,) = lines_of(axes[name])
        assert curve.get_ydata() == pytest.approx(expected), name


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--out", "curves.pdf"], "--out curves.pdf: it is a PNG: end the name in .png."),
        (["--out", "no/folder/a.png"], "there is no folder no/folder: create it first."),
        (["--out", "x" * 300 + ".png"], "File name too long: choose another."),
        (["--smooth", "0"], "--smooth: 0: give 1 or more"),
    ],
)
def test_a_mistake_is_a_sentence(one, flags, said, capsys):
    with pytest.raises((InputError, SystemExit)) as error:
        main([one, *flags])
    assert said in f"{error.value} {capsys.readouterr().err}"


def test_a_folder_that_is_no_run_is_one_sentence_on_stderr(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "nanopost.plot", str(tmp_path)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    expected = f"error: {tmp_path} holds no metrics.jsonl; name the --out of a run.\n"
    assert (done.returncode, done.stderr) == (1, expected)


def test_a_folder_that_holds_runs_names_them(one, other, tmp_path):
    with pytest.raises(InputError) as error:
        main([str(tmp_path)])
    assert str(error.value) == f"{tmp_path} holds no metrics.jsonl; {other} and {one} do."


def test_without_matplotlib_it_is_a_sentence(one, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs the package matplotlib: pip install matplotlib"):
        main([one])


def test_metrics_named_get_a_panel_each(one):
    run = read(one, "run")
    assert panels([run], ["lr", "loss"]) == [Panel(("lr",)), Panel(("loss",))]
