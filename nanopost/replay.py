"""The black box: does what a run with --record did in a step follow from its own data and weights?

    python -m nanopost.replay out/grpo --step 57
    python -m nanopost.replay out/grpo --steps 50:60
    python -m nanopost.replay out/grpo                    # every step with a record

A step is computed again in float64, in plain loops over one sequence at a time, from its record and
the checkpoint before it, and each line of the table compares one link of the chain

    rows -> mask -> log-probs -> advantage -> loss -> gradient -> learning rate -> weights

with what the run recorded. A link is computed from the links before it AS RECORDED, so that a fault
shows where it is made and not in all that follows. Where a line does not hold, causes are tried: the
formula with a known mistake in it that gives the recorded numbers is named.

Weights need the checkpoint before the step (--save_every 1 --keep 1000; the first step has
--model), and the one after it to compare what the optimizer did; without them the lines that need
none are checked, and the table says what is missing. The decoder itself, sampling, the value of a
reward and the held-out evaluation are taken as they are. Of KTO, BCO and AOT the gradient is checked
by the recorded slopes, of reward models the rows and the learning rate alone.

Exit status: 0 if all lines of all steps hold, else 1.

Shapes: T tokens of one sequence.
"""

import sys
from argparse import Namespace

from nanopost import InputError, cli, dist, links
from nanopost.links import Line
from nanopost.retrace import Recorded
from nanopost.terminal import say


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
    return links.of_step(run, run.step(number))


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
