"""Flags: bounds, sentences, --help, and every command that is written down somewhere."""

import re
import shlex

import pytest
import torch
from scripts import ROOT, SCRIPTS, parser_of
from small import small_model

from nanopost import InputError, cli, generate, plot
from nanopost.cli import above, at_least
from nanopost.dist import World
from nanopost.engine import Sampling


def refused(parser, *arguments, capsys):
    """-> what a person reads."""
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args([str(x) for x in arguments])
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    return err


def required(script) -> list[str]:
    """The flags that a script cannot do without."""
    given = ["--model", "m", "--data", "d"]
    if script in ("train_grpo.py", "train_ppo.py"):
        given += ["--reward", "exact"]
    if script == "train_distill.py":
        given += ["--teacher", "t"]
    return given


def one_flag(**options):
    parser = cli.Parser("doc")
    parser.add_argument("--x", **options)
    return parser


# ------------------------------------------------------------------------------------------ bounds
@pytest.mark.parametrize(
    "kind, fits, wrong",
    [
        (at_least(2), {"2": 2, "7": 7}, ["1", "-3", "2.5", "two", ""]),
        (at_least(0), {"0": 0}, ["-1"]),
        (at_least(0.0), {"0": 0.0, "1e-3": 1e-3, "2": 2.0}, ["-1e-9", "nan", "inf", "x"]),
        (at_least(0.0, most=1.0), {"0": 0.0, "1": 1.0, "0.5": 0.5}, ["1.01", "-0.1", "nan"]),
        (above(0.0), {"1e-9": 1e-9, "3": 3.0}, ["0", "-1", "nan", "inf", "x"]),
        (above(0.0, most=1.0), {"1e-9": 1e-9, "1": 1.0}, ["0", "1.01", "nan"]),
        (cli.finite, {"-3": -3.0, "0": 0.0}, ["nan", "inf", "-inf", "x"]),
    ],
)
def test_numbers_within_bounds_are_read_and_others_are_refused(kind, fits, wrong, capsys):
    parser = one_flag(type=kind)
    for text, value in fits.items():
        found = parser.parse_args(["--x", text]).x
        assert found == value and type(found) is type(value)
    for text in wrong:
        refused(parser, f"--x={text}", capsys=capsys)


def test_flags_say_how_to_sample():
    parser = cli.Parser("doc")
    cli.add_rollout_flags(parser)
    assert cli.sampling(parser.parse_args([])) == Sampling(512, kept=True)
    given = "--max_new_tokens 9 --temperature 0.7 --top_k 4 --top_p 0.8 --min_p 0.1 --stop a b"
    args = parser.parse_args(given.split())
    assert cli.sampling(args) == Sampling(9, 0.7, 4, 0.8, 0.1, ("a", "b"), kept=True)
    assert not cli.sampling(args, kept=False).kept


@pytest.mark.parametrize(
    "kind, text, sentence",
    [
        (at_least(2), "1", "1: give 2 or more"),
        (at_least(2), "a", "invalid int value: 'a'"),
        (at_least(0.0), "a", "invalid float value: 'a'"),
        (at_least(0.0, most=1.0), "2", "2: give 0.0 or more, and at most 1.0"),
        (above(0.0), "0", "0: give more than 0"),
        (above(0.0, most=1.0), "2", "2: give more than 0, and at most 1"),
        (above(0.0), "inf", "inf: give a finite number"),
        (at_least(0.0), "nan", "nan: give a finite number"),
        (above(0.0), "a", "invalid float value: 'a'"),
    ],
)
def test_a_number_out_of_bounds_says_what_would_fit(kind, text, sentence, capsys):
    said = refused(one_flag(type=kind), "--x", text, capsys=capsys)
    assert said == f"error: --x: {sentence} (--help lists all flags)\n"


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "name, value", [("steps", 0), ("group", 0), ("tokens", 1), ("lr", -1.0), ("save_every", -1)]
)
def test_numbers_that_mean_nothing_are_refused(script, name, value, capsys):
    parser = parser_of(script)
    given = required(script)
    if f"--{name}" in parser._option_string_actions:
        said = refused(parser, *given, f"--{name}={value}", capsys=capsys)
        assert f"--{name}: {value}: give " in said
    args = parser.parse_args([*given, "--lr", "0", "--eval_every", "0", "--save_every", "0"])
    assert args.lr == 0 and args.eval_every == 0


# --------------------------------------------------------------------------------------- sentences
@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--nonsense"], "--nonsense"),
        (["--steps", "many"], "--steps: invalid int value: 'many'"),
        (["--train_on", "nothing"], "--train_on: invalid choice: 'nothing'"),
        (["--rows"], "--rows: expected one argument"),
    ],
)
def test_a_wrong_flag_gets_one_sentence(arguments, sentence, capsys):
    given = ["--model", "m", "--data", "d"]
    said = refused(parser_of("train_sft.py"), *given, *arguments, capsys=capsys)
    assert said.startswith("error: ") and said.count("\n") == 1 and "usage" not in said
    assert sentence in said and said.endswith("(--help lists all flags)\n")


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ("--model m --data d --step 3", "arguments: --step 3; for --step, did you mean --steps?"),
        ("--model m --data d -steps 3", "arguments: -steps 3; for -steps, did you mean --steps?"),
        ("--model m --data d --max-length=9", "; for --max-length, did you mean --max_length?"),
        ("--modl m --data d", "required: --model; for --modl, did you mean --model?"),
        ("--modl m --dat d", "did you mean --model?; for --dat, did you mean --data?"),
        ("--model m --data d --qqqq", "arguments: --qqqq"),
        ("--model m --data d --steps x --row 3", "--steps: invalid int value: 'x'"),
    ],
)
def test_a_misspelt_flag_is_told_what_it_may_have_meant(arguments, sentence, capsys):
    said = refused(parser_of("train_sft.py"), *arguments.split(), capsys=capsys)
    assert f"{sentence} (--help lists all flags)\n" in said and said.count("\n") == 1


def test_commands_have_the_parser_that_tells_what_a_flag_may_have_meant(capsys):
    for command in (generate, plot):
        with pytest.raises(SystemExit):
            command.parsed(["x", "--modl", "--smoth"])
        assert "did you mean --" in capsys.readouterr().err


def test_what_is_required_is_asked_for_by_name(capsys):
    said = refused(parser_of("train_sft.py"), capsys=capsys)
    assert said.count("\n") == 1 and "--model" in said and "--data" in said


def test_one_value_each():
    cli.check_one_each("reward_weights", None, "reward", ["a", "b"])
    cli.check_one_each("reward_weights", [1.0, 2.0], "reward", ["a", "b"])
    sentence = "--reward_weights has 1 values for 2 --reward: give one each"
    with pytest.raises(InputError, match=sentence):
        cli.check_one_each("reward_weights", [1.0], "reward", ["a", "b"])


def test_what_does_not_divide_names_the_nearest_that_would():
    cli.check_divides("prompts", 12, ranks=2, minibatches=3)
    for value, sentence in (
        (13, "--prompts 13 does not divide into 2 ranks x 3 minibatches: 12 or 18 would."),
        (17, "--prompts 17 does not divide into 2 ranks x 3 minibatches: 12 or 18 would."),
        (5, "--prompts 5 does not divide into 2 ranks x 3 minibatches: 6 would."),
    ):
        with pytest.raises(InputError) as found:
            cli.check_divides("prompts", value, ranks=2, minibatches=3)
        assert str(found.value) == sentence


# -------------------------------------------------------------------------------------------- help
@pytest.mark.parametrize(
    "options, shown",
    [
        ({"default": 3, "help": "how many"}, "how many; default 3"),
        ({"default": [0.2, 0.3], "nargs": 2, "help": "how far"}, "how far; default 0.2 0.3"),
        ({"default": "auto"}, "default auto"),
        ({"default": 0, "help": "steps"}, "steps; default 0"),
        ({"default": 3, "help": "default: as many as fit"}, "default: as many as fit"),
        ({"default": None, "help": "a folder"}, "a folder"),
        ({"default": [], "nargs": "*", "help": "strings"}, "strings"),
        ({"action": "store_true", "help": "be quick"}, "be quick"),
    ],
)
def test_help_shows_each_default_once(options, shown):
    (line,) = [x for x in one_flag(**options).format_help().splitlines() if x.startswith("  --x")]
    assert line.endswith(f"  {shown}")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_explains_itself_and_each_of_its_flags(script, capsys):
    parser = parser_of(script)
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    doc = re.match(r'"""(.*?)"""', (ROOT / script).read_text(), re.S)[1]
    assert doc.replace("\\\\", "\\").strip() in shown
    assert f"\n    torchrun --nproc_per_node 8 {script} " in doc
    own = re.findall(r'\badd\(\s*"--(\w+)"', (ROOT / script).read_text())
    assert own
    for name in (*own, "model", "data", "out", "resume"):
        assert f"  --{name} " in shown or f"  --{name}\n" in shown, name
    for action in parser._actions:
        if action.default not in (None, False, "", []) and action.dest != "help":
            assert "default" in action.help, action.dest


def commands(text):
    """The calls of the scripts that a text holds, as a line or in backquotes -> [(script,
    arguments)]."""
    joined = text.replace("\\\\\n", " ").replace("\\\n", " ")
    found = []
    for line in [*joined.splitlines(), *re.findall(r"`([^`\n]+)`", joined)]:
        call = re.match(r"(?:python|torchrun [^#]*?) ?(train_\w+\.py) ?(.*)$", line.strip())
        if call:
            found.append((call[1], shlex.split(call[2].replace("$seed", "0"), comments=True)))
    return found


WRITTEN = ["README.md", "CONTRIBUTING.md", *SCRIPTS]
WRITTEN += [f"runs/{path.name}" for path in ROOT.glob("runs/toy*.sh")]  # others: test_recipes.py
WRITTEN += [f"docs/{path.name}" for path in ROOT.glob("docs/*.md")]


@pytest.mark.parametrize("path", WRITTEN)
def test_every_command_that_is_written_down_is_understood(path):
    found = commands((ROOT / path).read_text(encoding="utf8"))
    if path in SCRIPTS:
        assert {script for script, _ in found} == {path}
    if path == "README.md":
        assert {script for script, _ in found} == {*SCRIPTS}
    for script, arguments in found:
        parser_of(script).parse_args(arguments)


def test_every_row_of_grpos_table_is_understood():
    table = re.findall(r"^    .+ \d{4}\.\d{5} +(--.+)$", (ROOT / "train_grpo.py").read_text(), re.M)
    assert len(table) == 9
    for row in table:
        parser_of("train_grpo.py").parse_args(["--data", "d", "--reward", "exact", *row.split()])


# ------------------------------------------------------------------------------------------- shard
def test_the_flags_reach_the_model():
    given = ["--model", "m", "--data", "d", "--kernels", "torch", "--checkpointing", "full"]
    args = parser_of("train_sft.py").parse_args(given)
    world = World(0, 1, torch.device("cpu"), torch.float32)
    model = cli.shard(args, world)(small_model())
    assert model.kernels == "torch" and model.model.checkpointing == "full"


@pytest.mark.parametrize(
    "more, said",
    [
        (["--replicas", "3"], "--replicas 3 does not divide 4 ranks"),
        (["--replicas", "2", "--reproducible"], "leave out --replicas"),
        (["--reduce", "step", "--reproducible"], "leave out --reduce step"),
    ],
)
def test_what_ranks_cannot_do_together_is_one_sentence(more, said):
    args = parser_of("train_sft.py").parse_args(["--model", "m", "--data", "d", *more])
    with pytest.raises(InputError, match=said):
        cli.shard(args, World(0, 4, torch.device("cpu"), torch.float32))


# ------------------------------------------------------------------------------ flags of scripts
@pytest.mark.parametrize(
    "script, flags",
    [
        ("train_sft.py", "--epochs 0"),
        ("train_dpo.py", "--epochs 0"),
        ("train_dpo.py", "--loss_weights nan"),
        ("train_dpo.py", "--gamma inf"),
        ("train_kto.py", "--label_weights -1 1"),
        ("train_grpo.py", "--lr inf"),
        ("train_grpo.py", "--max_logp_gap 0"),
        ("train_ppo.py", "--max_logp_gap nan"),
        ("train_ppo.py", "--gamma 2"),
        ("train_online_dpo.py", "--reward_weights inf"),
        ("train_grpo.py", "--reward_timeout -1"),
        ("train_distill.py", "--beta 1.1"),
        ("train_distill.py", "--on_policy -0.1"),
        ("train_distill.py", "--teacher_top_k -1"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(script, flags, capsys):
    parser = parser_of(script)
    given = required(script)
    parser.parse_args(given)
    error = refused(parser, *given, *flags.split(), capsys=capsys)
    assert error.startswith(f"error: {flags.split()[0]}: ")


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_are_not_abbreviated(script, capsys):
    """--step would be --steps today, and perhaps another flag tomorrow."""
    parser = parser_of(script)
    given = required(script)
    assert parser.parse_args([*given, "--steps", "3"]).steps == 3
    assert "--step 3" in refused(parser, *given, "--step", 3, capsys=capsys)
