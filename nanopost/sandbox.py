"""Python programs that nobody has read, run where they can do no harm.

    stdout, ok = sandbox.run("print(6 * 7)")                        # "42\n", True

So an environment's tool is one line: `return sandbox.run(code)[0]`. `passed` runs many programs
against tests that they cannot see.

A program gets namespaces of its own (user, pid, mount, network, IPC, UTS): it sees the processes it
started, no network, no /proc, and the interpreter with its packages, read-only. It can write to
/tmp alone, which is new, small and in memory. No environment variable, no open file and no
capability reaches it. Limits are in Limits. At the end, all its processes are killed.

This holds as far as the kernel does. Not limited are the memory of all its processes together (at
most processes x memory, and what they write to memory files), and what a program learns from the
time that things take. sandbox_worker.py is the inside.
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from nanopost import InputError
from nanopost.sandbox_worker import NOBODY, VERDICTS, send

WORKER = Path(__file__).with_name("sandbox_worker.py")
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "TMPDIR": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # sets have the same order in every run
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
# What a program sees, besides the interpreter and its packages.
SYSTEM = ["/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc/ld.so.cache", "/nix/store"]
SYSTEM += ["/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"]
KILLED = b"k"  # a verdict: the kernel has ended the worker, since memory has run out


class Limits(NamedTuple):
    """Of one program. Sizes are in bytes."""

    seconds: float = 10.0  # of wall-clock time, and of CPU time of each process
    memory: int = 2**29  # address space of each process
    processes: int = 16  # and threads, at once; three are the sandbox's own
    output: int = 2**16  # that is read of stdout and stderr
    file: int = 2**24  # largest file
    folder: int = 2**26  # all of /tmp
    files: int = 64  # open at once, per process


DEFAULT = Limits()


class Job(NamedTuple):
    """A program and its tests, which run in another process.

    tests: statements, or functions test_*, that must not raise. setup: runs before them, and
    defines names for them. Any other name is Python's, or else the program's; entry is the
    program's always, and with entry_only nothing else is. must_ask: tests that ask the program
    nothing do not pass.
    """

    code: str
    tests: str
    setup: str = ""
    entry: str = ""
    entry_only: bool = False
    must_ask: bool = True


def run(code: str, limits: Limits = DEFAULT, isolated: bool = True) -> tuple[str, bool]:
    """Run a program -> (stdout and stderr, whether it ended by itself and without an error).

    Where limits stop the program or cut its output, the output says so.
    """
    with tempfile.TemporaryDirectory() as folder:
        worker = _start(limits, isolated, folder)
        try:
            output, verdict = _ask(worker, {"code": code, "tests": None}, limits)
        finally:
            _stop(worker)
    text = output[: limits.output].decode(errors="replace")
    why = {b"t": f"after {limits.seconds:g} seconds", KILLED: "as memory ran out"}.get(verdict)
    if len(output) > limits.output:
        why = f"after {limits.output:,} bytes of output"
    if why:
        text = f"{text.rstrip()}\n[stopped {why}]\n".lstrip()
    return text, verdict == b"+" and not why


def passed(jobs: list[Job], limits: Limits = DEFAULT, isolated: bool = True) -> list[bool]:
    """Whether each program passes its tests. They run concurrently, one per CPU of this rank.

    Tests are run, in a sandbox too, by a process that calls the program's functions over a pipe.
    None, numbers, text, bytes, lists, tuples, sets, dicts, ranges, Python's own types, numpy's
    arrays, Fraction, Decimal, date, timedelta, Counter and deque cross it as copies: a test cannot
    see an argument changed in place, and a value of a subclass (a named tuple) is one of the class
    above. Other objects stay in the program: tests can call them, iterate over them, use their
    attributes and the operations of sandbox_worker.OPERATIONS, but they equal nothing (not even
    themselves, so no member of an Enum equals another), are not compared or added, and are not
    awaited. Tests cannot give the program functions or objects of their own, nor catch errors of
    its own classes: those are of the next class that is Python's.
    """
    if not jobs:
        return []
    verdicts = [False] * len(jobs)
    waiting = deque(enumerate(jobs))

    def work(_):
        worker = _start(limits, isolated, folder)
        try:
            while True:
                try:
                    i, job = waiting.popleft()
                except IndexError:
                    return
                verdict = _ask(worker, job._asdict(), limits)[1]
                verdicts[i] = verdict == b"+"
                if verdict in (b"t", KILLED):  # the worker has ended too
                    _stop(worker)
                    worker = _start(limits, isolated, folder)
        finally:
            _stop(worker)

    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    workers = min(len(jobs), max(1, len(os.sched_getaffinity(0)) // ranks))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        try:
            list(pool.map(work, range(workers)))
        finally:
            waiting.clear()
    return verdicts


def check(isolated: bool = True):
    """InputError if programs cannot be run here."""
    output, ok = run("import random\nprint(6 * 7)", isolated=isolated)
    if not ok:
        raise InputError(f"the sandbox cannot run a program: {output.strip()[-200:]!r}.")


# -------------------------------------------------------------------------------------- one worker
def _start(limits, isolated, folder):
    own = [sys.base_prefix, sys.base_exec_prefix, *packages()]
    own += [os.path.realpath(path) for path in own]
    hidden = [path for path in own if path.startswith("/tmp/")]
    if isolated and hidden:
        raise InputError(
            f"the sandbox has a /tmp of its own, so it cannot use Python's {hidden[0]}: put the "
            "interpreter and its packages elsewhere."
        )
    given = {
        **limits._asdict(),
        "isolated": isolated,
        "packages": packages(),
        "visible": _outermost([*SYSTEM, *map(os.path.realpath, SYSTEM), *own]),
        "temporary": folder,
    }
    worker = subprocess.Popen(
        [sys.executable, "-S", "-s", "-P", str(WORKER), json.dumps(given)],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd="/",
        env=ENVIRONMENT,
        start_new_session=True,
    )
    try:
        if isolated:
            _expect(worker, b"unshared\n")
            _map_user(worker)
        _expect(worker, b"ready\n")
    except BaseException:
        _stop(worker)
        raise
    return worker


def packages() -> list[str]:
    """The folders of installed packages."""
    return [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]


def _outermost(paths):
    """Those of the paths that exist, without what lies in another."""
    kept = []
    for path in sorted({path for path in paths if os.path.exists(path)}, key=len):
        if not any(path.startswith(f"{other}/") for other in kept):
            kept.append(path)
    return kept


def _map_user(worker):
    """The one user inside is this one outside. For root it is nobody, since the kernel does not
    limit how many processes root has."""
    process = Path("/proc", str(worker.pid))
    try:
        if os.geteuid():
            (process / "setgroups").write_text("deny", encoding="utf-8")
        for name, own in [("gid_map", os.getegid()), ("uid_map", os.geteuid())]:
            outside = own
            if not os.geteuid() and _is_mapped(name, NOBODY):
                outside = NOBODY
            (process / name).write_text(f"{NOBODY} {outside} 1", encoding="utf-8")
    except OSError as error:
        raise _refused(error) from error
    if not outside and _maps(name)[0][1] == 0:
        raise _refused("this user namespace has no user but root")
    worker.stdin.write(b"\n")


def _maps(name):
    """The ranges of this process's user namespace: first inside, first outside, size."""
    lines = Path("/proc/self", name).read_text(encoding="utf-8").splitlines()
    return [list(map(int, line.split())) for line in lines]


def _is_mapped(name, number):
    return any(first <= number < first + size for first, _, size in _maps(name))


def _expect(worker, line):
    found = worker.stderr.readline()
    if found != line:
        found += worker.stderr.read()
        raise _refused(found.decode(errors="replace").strip().rpartition("\n")[2])


def _refused(why):
    return InputError(
        f"the sandbox fails ({why}): it needs Linux from 5.14 on x86_64 or aarch64, and user "
        "namespaces (Ubuntu: sysctl kernel.apparmor_restrict_unprivileged_userns=0; Docker: "
        "--privileged); --unsafe_code runs programs without it, with this user's rights."
    )


def _ask(worker, job, limits) -> tuple[bytes, bytes]:
    """Run a job -> (output, one of VERDICTS, or KILLED). Its processes have ended by then."""
    output, verdict = b"", b""
    try:
        send(worker.stdin.fileno(), job)
    except BrokenPipeError:
        pass  # its stderr tells why
    ready = select.poll()
    ready.register(worker.stdout, select.POLLIN)
    ready.register(worker.stderr, select.POLLIN)
    while not verdict:
        readable = [descriptor for descriptor, _ in ready.poll()]
        if worker.stdout.fileno() in readable:  # all of it, before the verdict
            part = os.read(worker.stdout.fileno(), 2**16)
            if not part:
                ready.unregister(worker.stdout)
            if len(output) <= limits.output:
                output += part
                if len(output) > limits.output:
                    os.killpg(worker.pid, signal.SIGALRM)  # the keeper ends the program
            continue
        verdict = os.read(worker.stderr.fileno(), 1)
        if not verdict and worker.wait() == -signal.SIGKILL:
            verdict = KILLED
        elif verdict not in VERDICTS.values():
            text = (verdict + worker.stderr.read()).decode(errors="replace")
            raise _refused(text.strip().replace("\n", "; ")[-200:])
    return output, verdict


def _stop(worker):
    try:
        os.killpg(worker.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    worker.wait()
    for pipe in (worker.stdin, worker.stdout, worker.stderr):
        pipe.close()
