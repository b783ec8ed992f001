"""--reward code on HumanEval and MBPP: their own solutions, and solutions with a fault, in the
sandbox; and how many programs it runs in a second.

    python -m bench.code DATA [--programs 512]        # about a minute on two cores

DATA: a folder with humaneval.jsonl.gz and mbpp.jsonl, as their authors publish them. Two kinds of
fault: each function returns something else, which every test must notice; and one small change (a
comparison, plus and minus, a number), which tests notice if they are good. For those the verdict
is compared with that of one process which runs program and tests, as most harnesses do.
"""

import ast
import gzip
import json
import math
import os
import random
import resource
import signal
import time
from pathlib import Path

from bench import common
from nanopost import sandbox, verify

LIMITS = sandbox.Limits(seconds=3.0)  # a fault may make a loop endless


class OtherReturn(ast.NodeTransformer):
    """Each function returns a tuple of what it returned and 0."""

    def visit_Return(self, node):
        value = node.value or ast.Constant(None)
        return ast.Return(ast.Tuple([value, ast.Constant(0)], ast.Load()))


class SmallChange(ast.NodeTransformer):
    """The n-th place that can be changed is changed; `places` counts them."""

    OTHER = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
    OTHER |= {ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Add: ast.Sub, ast.Sub: ast.Add}

    def __init__(self, n):
        self.n = n
        self.places = 0

    def is_here(self):
        self.places += 1
        return self.places == self.n + 1

    def visit(self, node):
        if type(node) in self.OTHER and self.is_here():
            return self.OTHER[type(node)]()
        if isinstance(node, ast.Constant) and type(node.value) is int and self.is_here():
            return ast.Constant(node.value + 1)
        return self.generic_visit(node)


def changed(code, transformer):
    return ast.unparse(ast.fix_missing_locations(transformer.visit(ast.parse(code))))


def small_change(code, draw):
    """The code with one small change, or None if it has no place for one."""
    counter = SmallChange(-1)
    counter.visit(ast.parse(code))
    if not counter.places:
        return None
    return changed(code, SmallChange(draw.randrange(counter.places)))


def jobs_of(rows, programs):
    """Programs beside the tests of their rows."""
    return [verify.job_of(row, row.get("prompt", ""), code) for row, code in zip(rows, programs)]


def measured(rows, solutions, draw):
    patient = sandbox.Limits(seconds=60.0)  # one takes two seconds of CPU time
    own = sandbox.passed(jobs_of(rows, solutions), patient)
    other = [changed(code, OtherReturn()) for code in solutions]
    other = sandbox.passed(jobs_of(rows, other), LIMITS)
    small = [(row, small_change(code, draw)) for row, code in zip(rows, solutions)]
    small = [(row, code) for row, code in small if code is not None]
    jobs = jobs_of(*zip(*small))
    survived = sandbox.passed(jobs, LIMITS)
    alone = [in_one_process(job) for job in jobs]
    return {
        "solutions": len(rows),
        "solutions that pass": sum(own),
        "with other returns": len(rows),
        "with other returns that pass": sum(other),
        "with a small change": len(small),
        "with a small change that pass": sum(survived),
        "verdicts that one process does not give": sum(x != y for x, y in zip(survived, alone)),
    }


def in_one_process(job):
    child = os.fork()
    if not child:
        signal.alarm(math.ceil(2 * LIMITS.seconds))
        resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
        null = os.open("/dev/null", os.O_RDWR)
        for descriptor in range(3):
            os.dup2(null, descriptor)
        try:
            names = {"__name__": "program"}
            own_tests = "" if job.entry else job.setup  # HumanEval's setup is the prompt
            exec(f"{job.code}\n{own_tests}\n{job.tests}", names)
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def cpu_seconds():
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in used)


def main():
    parser = common.parser(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--programs", type=int, default=512)
    args = parser.parse_args()
    draw = random.Random(0)
    human = gzip.decompress((args.data / "humaneval.jsonl.gz").read_bytes()).decode()
    human = [json.loads(line) for line in human.splitlines()]
    mbpp = (args.data / "mbpp.jsonl").read_text(encoding="utf8")
    mbpp = [json.loads(line) for line in mbpp.splitlines()]
    result = common.origin()
    result["cores"] = len(os.sched_getaffinity(0))
    bodies = [row["prompt"] + row["canonical_solution"] for row in human]
    result["humaneval"] = measured(human, bodies, draw)
    result["mbpp"] = measured(mbpp, [row["code"] for row in mbpp], draw)
    batch = (jobs_of(mbpp, [row["code"] for row in mbpp]) * 2)[: args.programs]
    for name, isolated in [("sandbox", True), ("unsafe", False)]:
        began, cpu = time.perf_counter(), cpu_seconds()
        sandbox.passed(batch, isolated=isolated)
        seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu
        result[name] = {
            "programs": len(batch),
            "seconds": seconds,
            "CPU seconds": cpu,
            "programs per CPU second": len(batch) / cpu,
        }
    print(json.dumps(result, indent=1))
    common.save(common.RESULTS / "code.json", result)


if __name__ == "__main__":
    main()
