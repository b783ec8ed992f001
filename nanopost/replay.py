"""The black box: does what a run with --record did in a step follow from its own data and weights?

    python -m nanopost.replay out/grpo --step 57
    python -m nanopost.replay out/grpo --steps 50:60
    python -m nanopost.replay out/grpo                    # every step with a record

A step is computed again in float64, in plain loops over one sequence at a time, from its record and
the checkpoint before it. Each line of the table compares one link of a chain with what the run
recorded:

    rows -> mask -> log-probs -> advantages -> loss -> gradient -> learning rate -> weights

A link is computed from the links before it AS RECORDED, so that a fault shows where it is made and
not in all that follows. Where a line does not hold, known mistakes are tried: the one that gives
the recorded numbers is named. What is allowed is rounding: see links.Rounding.

Weights need the checkpoint before the step (--save_every 1 --keep 1000; the first step has
--model), and the one after it to compare what the optimizer did. Without them the lines that need
none are checked, and the rest is said to be missing. The decoder itself, sampling, the values of
rewards, and the held-out evaluation are taken as they are. Of KTO, BCO and AOT the gradient is
checked by the recorded slopes; of a reward model, the learning rate alone.

Exit status: 0 if all lines of all steps hold, else 1.

Shapes: T tokens of one sequence.
"""

import sys
from argparse import Namespace

from nanopost import InputError, cli, dist, links, updates
from nanopost.links import Line
from nanopost.retrace import Recorded
from nanopost.terminal import say

FORKED = (
    *("entropy_coef", "turn", "delta", "top_entropy", "off_policy_mask"),
    *("kl_target", "kl_stop", "ld_alpha", "follow_every"),
)  # flags of forks that change a formula


def table(lines: list[Line]) -> list[str]:
    """At most 100 columns."""
    head = f"  {'':22}{'recorded':>14}{'recomputed':>14}{'difference':>12}{'allowed':>10}"
    found = [head]
    for line in lines:
        if line.note:
            found.append(f"  {line.what:22}  not checked: {line.note}")
            continue
        numbers = f"{line.recorded:14.6g}{line.recomputed:14.6g}{line.difference:12.2g}"
        verdict = "holds" if line.holds else "NOT"
        found.append(f"  {line.what:22}{numbers}{line.tolerance:10.1g}  {verdict}")
    return found


def verdict(step: int, lines: list[Line]) -> str:
    """One sentence: the first link that does not hold and of which a cause is known, or else the
    first one."""
    checked = [line for line in lines if not line.note]
    wrong = [line for line in checked if not line.holds]
    missing = [line.what for line in lines if line.note]
    left_out = f" ({', '.join(missing)} not checked)" if missing else ""
    if not wrong:
        return f"step {step}: all {len(checked)} lines hold{left_out}"
    first = next((line for line in wrong if line.cause), wrong[0])
    cause = first.cause or f"{first.where}; no cause that replay knows gives the recorded numbers"
    after = ", ".join(line.what for line in wrong if line is not first)
    after = f" (then also: {after})" if after else ""
    return f"step {step}: {first.what} does NOT hold: {cause}{after}{left_out}"


def replayed(run: Recorded, number: int) -> list[Line]:
    """The lines of a step, in the order in which one link follows from another."""
    kind, step = run.kind, run.step(number)
    allowed = links.rounding(run, step)
    lines = links.of_rows(run, step)
    if kind in ("grpo", "ppo", "online_dpo", "distill"):
        lines += links.of_sampling(run, step, allowed)
    if kind == "grpo":
        lines += links.of_group_advantages(step)
    if kind == "ppo":
        lines += links.of_values(run, step, allowed)
        lines += links.of_gae(run, step)
    if kind in ("dpo", "online_dpo", "kto"):
        lines += links.of_pair_references(run, step, allowed)
    if kind == "rm":
        note = "of a reward model replay covers the learning rate alone"
        return [*lines, Line("loss and gradient", note=note), updates.of_rate(run, step)]
    parts = updates.optimizer_steps(run, step)
    count = updates.of_count(step, parts)
    if not count.holds:  # which of them is missing nothing says
        return [*lines, count]
    lines += updates.of_passes(step)
    lines += updates.of_divisors(step, parts)
    lines += updates.of_losses(run, step, parts)
    lines += updates.of_updates(run, step, parts, allowed)
    fork = [name for name in FORKED if name in vars(step.flags)]
    if fork:
        lines.append(Line("the fork", note=f"replay has no formula for --{' --'.join(fork)}"))
    return lines


def asked(args, run: Recorded) -> list[int]:
    """The steps to replay. InputError if one has no record."""
    if args.step is not None:
        steps = [args.step]
    elif args.steps:
        first, colon, last = args.steps.partition(":")
        if not (colon and first.isdigit() and last.isdigit()):
            raise InputError(f"--steps {args.steps}: give FIRST:LAST, such as 50:60.")
        steps = list(range(int(first), int(last) + 1))
    else:
        return list(run.paths)
    missing = [step for step in steps if step not in run.paths]
    if missing or not steps:
        has = f"{min(run.paths)} to {max(run.paths)}"
        raise InputError(f"step {(missing or [args.steps])[0]} has no record: {run.out} has {has}.")
    return steps


def parsed(arguments=None) -> Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("run", metavar="OUT", help="folder of a run with --record")
    add("--step", type=cli.at_least(1), help="replay this step")
    add("--steps", metavar="FIRST:LAST", help="replay these; default: every step with a record")
    return parser.parse_args(arguments)


def main(arguments=None):
    args = parsed(arguments)
    dist.init("cpu", "fp32")
    run = Recorded(args.run)
    steps, wrong = asked(args, run), 0
    for step in steps:
        lines = replayed(run, step)
        holds = all(line.holds for line in lines)
        if not holds or len(steps) == 1:
            for line in table(lines):
                say(line)
        say(verdict(step, lines))
        wrong += not holds
    if len(steps) > 1:
        say(f"{len(steps)} steps, {wrong} of them do not hold")
    dist.finish()
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
