"""The rules of the house that a machine can check: order, formatting, who declares flags, who
shifts targets, who imports what."""

import ast
import re
import subprocess
import sys

import pytest
from scripts import ROOT, SCRIPTS, parser_of

from nanopost import cli

LIBRARY = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("nanopost/*.py"))
KERNELS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("kernels/*.py"))


def text(path):
    return (ROOT / path).read_text(encoding="utf8")


# ------------------------------------------------------------------------------- scripts, in order
BANNERS = ["arguments", "setup", "loop", "save"]
PHASES = [
    "rollout",
    "log-probs",
    "examples",
    "pairs",
    "advantage",
    "first pass",
    "second pass",
    "update",
    "sync",
    "log",
    "save",
]


def phases(script):
    """The banners in the loop: what each begins with, up to a colon or a comma."""
    found = []
    for title in re.findall(r"^    # ---- (.+)$", text(script), re.M):
        fits = [name for name in PHASES if re.match(rf"{name}\b(?!-)", title)]
        assert fits, f"{script}: {title!r} is none of {', '.join(PHASES)}"
        found += fits
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_the_same_banners_in_the_same_order(script):
    found = re.findall(r"^(# -+ (.+))$", text(script), re.M)
    assert [title for _, title in found] == BANNERS
    assert {len(line) for line, _ in found} == {100}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_loop_has_its_phases_in_the_same_order(script):
    found = phases(script)
    assert found == sorted(set(found), key=PHASES.index)
    assert "update" in found or found[-4:-2] == ["first pass", "second pass"]
    assert found[-2:] == ["log", "save"]
    assert ("sync" in found) == ("rollout" in found)


# Repeated on purpose, because researchers edit what surrounds it: it is the same everywhere.
REPEATED = [
    "args = parser.parse_args()\n",
    "world = dist.init(args.device, args.dtype, args.seed, args.reproducible, args.dry_run)\n",
    "tokenizer = Tokenizer.load(args.model, args.chat_template)\n",
    "state = run.start(model, optimizer, fresh, args.resume, args.overwrite, "
    "fingerprint(tokenizer))\nrun.say(check_stage(args.model, tokenizer))\n",
    "if not run.resumed:\n    run.log(0, evaluate())\n"
    'for step in range(state["step"] + 1, args.steps + 1):\n',
    ").backward()\n",
    "grad_norm = dist.clip_grad_norm(model, args.grad_clip)\n",
    "check_finite(grad_norm, step, model, ",
    "optimizer.step()\n",
    "optimizer.zero_grad(set_to_none=True)\n",
    "    if run.due(step, args.eval_every):\n        metrics |= evaluate()\n"
    "    run.log(step, metrics)\n",
    "    # ---- save\n    if run.due_save(step, args.save_every, args.save_minutes):\n"
    "        run.save(step, model, optimizer, state)\n",
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_every_script_repeats_is_the_same_in_all(script):
    for lines in REPEATED:
        assert text(script).count(lines) == 1, lines
    assert text(script).endswith("\nrun.finish()\n")


def test_grpo_and_ppo_sample_and_evaluate_by_the_same_code():
    def functions(script):
        tree = ast.parse(text(script))
        return {f.name: ast.unparse(f) for f in tree.body if isinstance(f, ast.FunctionDef)}

    one, other = functions("train_grpo.py"), functions("train_ppo.py")
    for name in ("rollout", "evaluate"):
        assert one[name] == other[name]


# ------------------------------------------------------------------------------------------- flags
def group_parsers():
    """{name in cli: a parser of these flags alone}."""
    found = {"parser": cli.parser("", out="out", lr=1.0)}
    for name in dir(cli):
        if name.startswith("add_") and name.endswith("_flags"):
            found[name] = cli.Parser("")
            getattr(cli, name)(found[name])
    return found


GROUPS = group_parsers()


def flags(parser):
    return {action.dest: action for action in parser._actions if action.dest != "help"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_declares_a_flag_that_it_has_from_cli(script):
    own = set(re.findall(r'\badd\(\s*"--(\w+)"', text(script)))
    called = [name for name in GROUPS if f"cli.{name}(" in text(script)]
    assert "parser" in called
    shared = set().union(*(flags(GROUPS[name]) for name in called))
    assert not own & shared
    assert own | shared == flags(parser_of(script)).keys()


def meaning(action):
    """What a flag takes: how many values, and what becomes of some texts."""
    read = []
    for given in ("-1", "0", "0.5", "1", "3", "many"):
        try:
            read.append((action.type or str)(given))
        except Exception as error:
            read.append(type(error))
    return action.nargs, action.const, read


# Flags of one name that mean different things in different scripts, each with its reason.
DIFFERENT = {
    "loss": "one, or several that are added up",
    "beta": "a KL coefficient, which may be 0, or the scale of a log-ratio, which may not",
    "gamma": "of simpo a margin, of PPO a discount",
    "group": "where samples of a prompt are compared, at least two",
}


def test_a_flag_of_one_name_takes_the_same_values_in_every_script():
    found = {}
    for script in SCRIPTS:
        for name, action in flags(parser_of(script)).items():
            found.setdefault(name, []).append((script, meaning(action)))
    for name, meanings in found.items():
        if name not in DIFFERENT:
            (script, first), *others = meanings
            for other, here in others:
                assert here == first, f"--{name} in {script} and {other}"


def test_the_library_reads_no_flags():
    """Except cli.py, and what is a command itself (python -m nanopost.eval) or a part of one
    (footprint.py, of plan.py)."""
    for path in LIBRARY:
        is_command = '__name__ == "__main__"' in text(path)
        if path not in ("nanopost/cli.py", "nanopost/footprint.py") and not is_command:
            assert not re.search(r"\bargs\.\w", text(path)), path
            assert "parse_args" not in text(path), path


# ----------------------------------------------------------------------------------------- imports
ORACLES = {"transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate"}
OPTIONAL = {"matplotlib", "pyarrow", "wandb", "tensorboard", "vllm", "math_verify"}


def imports(nodes):
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("path", [*LIBRARY, *KERNELS, *SCRIPTS])
def test_oracles_are_never_imported_and_optional_packages_where_they_are_used(path):
    tree = ast.parse(text(path))
    assert not imports(ast.walk(tree)) & ORACLES
    if path != "nanopost/vllm_worker.py":  # it runs inside vLLM
        assert not imports(tree.body) & OPTIONAL


# ----------------------------------------------------------------------------------------- targets
# Slices and rolls by one that shift no target, each with its reason.
HARMLESS = {
    "e.ids[1:]": "report.py: is there a second BOS?",
    "np.roll(drawn, -1)": "pairs.py: a random cycle of rows",
}


def shifts(path):
    """Text that would shift what belongs to tokens by one: [1:], [:-1], roll."""
    found = []
    for node in ast.walk(ast.parse(text(path))):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("roll"):
            found.append(ast.unparse(node))
        if isinstance(node, ast.Subscript):
            parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            slices = {ast.unparse(part) for part in parts if isinstance(part, ast.Slice)}
            of_tokens = re.search(
                r"mask|target|token|label|ids|logp|value|adv|_B?[NT]$", ast.unparse(node.value)
            )
            if of_tokens and slices & {"1:", ":-1"}:
                found.append(ast.unparse(node))
    return [shift for shift in found if shift not in HARMLESS]


def test_batch_py_alone_shifts_targets():
    assert len(shifts("nanopost/batch.py")) >= 3  # or this test sees nothing
    for path in [*LIBRARY, *KERNELS, *SCRIPTS]:
        if path != "nanopost/batch.py":
            assert not shifts(path), path


# ----------------------------------------------------------------------------------------- files
def opened_as_text(path):
    """Calls that read or write text, and whether they name its encoding."""
    for node in ast.walk(ast.parse(text(path))):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func).split(".")[-1]
        modes = [ast.unparse(argument) for argument in node.args[1:2]]
        if name in ("read_text", "write_text") or name == "open" and "b" not in "".join(modes):
            yield ast.unparse(node), any(word.arg == "encoding" for word in node.keywords)


def test_text_is_utf_8_in_any_locale():
    found = [call for path in [*LIBRARY, *SCRIPTS] for call in opened_as_text(path)]
    assert len(found) >= 10  # or this test sees nothing
    assert [call for call, names_it in found if not names_it and "os.O_" not in call] == []


# ------------------------------------------------------------------------------------------ tools
@pytest.mark.parametrize("command", [["format", "--check"], ["check"]], ids=" ".join)
def test_ruff_has_nothing_to_say(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


def test_the_tree_in_the_readme_is_the_tree_there_is():
    """Each name in it is that of a file, and it names all scripts and all library modules."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text("README.md"), re.M | re.S)
    trees = [block for block in blocks if re.search(r"^nanopost/", block, re.M)]
    assert len(trees) == 1, "README.md needs one code block that is the tree, with a line nanopost/"
    named = re.findall(r"[\w*/]+\.(?:py|sh|md|toml|txt)\b|^\w+/", trees[0], re.M)
    found = set()
    for name in named:
        paths = {path for folder in (".", "*") for path in ROOT.glob(f"{folder}/{name}")}
        assert paths, f"README.md: {name} is in the tree alone"
        found |= {path.relative_to(ROOT).as_posix() for path in paths}
    assert {*SCRIPTS, *LIBRARY} - {"nanopost/__init__.py"} <= found
