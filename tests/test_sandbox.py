"""Programs in the sandbox: hostile ones do no harm and pass no test, honest ones are not hindered,
and solutions of HumanEval and MBPP pass."""

import ast
import ctypes
import gzip
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy
import pytest
from hostile import CHECK, FORGERIES, HOSTILE, PORT, SECRET, WRONG
from inprocess import run_here

from nanopost import InputError, cli, rewards, sandbox, verify
from nanopost.sandbox import Job, Limits
from runs import toy

# A sandbox that is refused for any other reason is broken, and the tests say so.
UNSHARE = "import ctypes, sys; sys.exit(ctypes.CDLL(None).unshare(0x10000000) != 0)"
REASON = ""
if subprocess.run([sys.executable, "-c", UNSHARE]).returncode:
    REASON = "this kernel refuses user namespaces"
isolated = pytest.mark.skipif(bool(REASON), reason=REASON)
QUICK = Limits(seconds=0.6)  # for programs that would never end


def passed(code, tests, **more):
    return sandbox.passed([Job(code, tests, **more)])[0]


# ------------------------------------------------------------------------------------------- honest
@isolated
@pytest.mark.parametrize(
    "code, output, ok",
    [
        ("print(6 * 7)", "42\n", True),
        ("import sys\nprint('to stderr', file=sys.stderr)", "to stderr\n", True),
        ("print('\u2603 \u00e9')", "\u2603 \u00e9\n", True),
        ("if __name__ == '__main__':\n    print('main')", "main\n", True),
        ("import sys\nsys.exit()", "", True),
        ("import sys\nsys.exit(3)", "", False),
        ("exit()", "", True),
        ("quit(3)", "", False),
        ("import os\nos._exit(0)", "", True),
        ("import os\nos.kill(os.getpid(), 11)", "", False),
        ("open('a', 'w').write('b')\nprint(open('/tmp/a').read())", "b\n", True),
        ("import numpy\nprint(numpy.ones(2) @ numpy.ones(2))", "2.0\n", True),
        (
            "from threading import Thread\nt = Thread(target=print, args=[1])\nt.start()",
            "1\n",
            True,
        ),
        ("import subprocess\nsubprocess.run(['/bin/echo', 'hi'])", "hi\n", True),
        ("import asyncio\nprint(asyncio.run(asyncio.sleep(0, 5)))", "5\n", True),
        ("input()", "EOFError: EOF when reading a line\n", False),
        (
            "print('a')\n1 / 0",
            'a\nTraceback (most recent call last):\n  File "program.py", ',
            False,
        ),
        ("def f(:", "SyntaxError: invalid syntax\n", False),
    ],
)
def test_a_program_runs_as_python_runs_it(code, output, ok):
    found, fine = sandbox.run(code)
    assert fine == ok
    assert output in found if not ok else output == found


VALUES = [
    *("None", "True", "-3", "10**30", "2.5", "float('inf')", "3+4j", "'\u2603'", "b'ab'"),
    *("[1, [2, 'a']]", "(1, (2,))", "{1, 2}", "frozenset({1})", "{1: 'a', (2, 3): [None]}"),
    *("range(1, 9, 2)", "bytearray(b'a')", "set()", "()", "{}", "int", "'\\ud800'"),
    *("-(7**6000)", "Fraction(1, 3)", "Decimal('1.50')", "date(2024, 2, 29)"),
    *("timedelta(1, 2, 3)", "Counter('aab')", "deque([1, (2,)], 5)"),
]
TYPES = """
from collections import Counter, deque
from datetime import date, timedelta
from decimal import Decimal
from fractions import Fraction
"""


@isolated
def test_a_value_crosses_to_the_program_and_back():
    same, other = "def f(x):\n    return x", "def f(x):\n    return [x]"
    tests = [f"{TYPES}assert f({x}) == {x}\nassert type(f({x})) is type({x})" for x in VALUES]
    assert sandbox.passed([Job(same, test) for test in tests]) == [True] * len(VALUES)
    assert sandbox.passed([Job(other, test) for test in tests]) == [False] * len(VALUES)


@isolated
def test_tests_use_functions_objects_and_errors_of_the_program():
    code = """
import collections, fractions
LIMIT = 7
class Node:
    def __init__(self, value):
        self.value = value
        self.next = None
    def total(self, *, twice=False):
        rest = self.next.total() if self.next else 0
        return (self.value + rest) * (2 if twice else 1)
def last(node):
    return node.next or node
def squares(n):
    for i in range(n):
        yield i * i
def count(text):
    return collections.Counter(text)
def fails(x):
    raise KeyError(x)
def adder(n):
    return lambda x: x + n
class Bag:
    def __init__(self, *values):
        self.values = list(values)
    def __len__(self):
        return len(self.values)
    def __getitem__(self, i):
        return self.values[i]
    def __setitem__(self, i, value):
        self.values[i] = value
    def __contains__(self, value):
        return value in self.values
    def __str__(self):
        return "bag"
    def __float__(self):
        return 1.5
    def __enter__(self):
        return self.values
    def __exit__(self, *_):
        self.values.append("left")
        return True
def decoded(text):
    return text.decode()
class Wrong(ValueError):
    pass
def refuses():
    raise Wrong("no", 5)
def stops():
    raise StopIteration
def endless():
    while True:
        yield 1
def matrix(rows):
    import numpy
    return numpy.array(rows) * 2
def scalars():
    import numpy
    return [numpy.bool_(False), numpy.int64(3), numpy.float32(0.5)]
"""
    tests = """
node = Node(1)
node.next = Node(5)
assert node.total() == 6 and node.total(twice=True) == 12 and node.next.value == 5
assert last(node).value == 5
assert list(squares(4)) == [0, 1, 4, 9] and sum(squares(3)) == 5
assert count("aab") == {"a": 2, "b": 1}
assert scalars() == [False, 3, 0.5] and matrix([[1, 2]]).tolist() == [[2, 4]]
bag = Bag(1, 2)
bag[0] = 7
assert len(bag) == 2 and bag[0] == 7 and 2 in bag and 3 not in bag and bag and not Bag()
assert str(bag) == "bag" and math.isclose(bag, 1.5) and isinstance(bag, Bag)
with bag as values:
    assert list(values) == [7, 2]
assert bag[2] == "left"
try:
    with bag:
        assert False
    left = True
except AssertionError:
    left = False
assert not left
try:
    refuses()
except ValueError as error:
    assert error.args == ("no", 5)
try:
    b"\\xff".decode()
    assert False
except UnicodeDecodeError:
    pass
try:
    decoded(b"\\xff")
    assert False
except UnicodeDecodeError as error:
    assert error.start == 0
try:
    [x for x in map(lambda _: stops(), [1])]
    assert False
except RuntimeError:
    pass
ones = endless()
assert next(ones) == 1 and list(zip(ones, "ab")) == [(1, "a"), (1, "b")]
test_node = Node(3)
assert test_node.value == 3
assert adder(2)(3) == 5 and LIMIT == 7 and isinstance(LIMIT, int)
try:
    fails("x")
except KeyError as error:
    assert error.args == ("x",)
else:
    assert False
def test_that_is_called():
    assert math.isclose(LIMIT, 7.0)
"""
    assert passed(code, tests)
    assert not passed(code.replace("i * i", "i"), tests)
    assert not passed(code.replace("LIMIT = 7", "LIMIT = 8"), tests)
    assert not passed(code, tests.replace("(LIMIT, 7.0)", "(LIMIT, 7.1)"))  # in the function
    assert not passed(code, tests + "assert no_such_name(1)")
    assert not passed(code + "1 / 0", tests)
    # a text that names a module does not make its name the module's
    assert passed("def select(x):\n    return x", "assert select('select.') == 'select.'")


@isolated
def test_tests_that_ask_the_program_nothing_pass_nothing():
    code = "def f(x):\n    return 2"
    tests = ["", "1 == 2", "def check(f):\n    assert f(1) == 3", "assert True"]
    tests += ["async def test_f():\n    assert f(1) == 3"]
    assert sandbox.passed([Job(code, test) for test in tests]) == [False] * len(tests)
    assert sandbox.passed([Job(code, test, must_ask=False) for test in tests]) == [True] * 5
    assert not passed("1 / 0", "assert True", must_ask=False)


@isolated
def test_output_is_cut_and_said_to_be_however_a_program_ends():
    """It ends while its keeper is told to end it."""
    code = "import os\nos.write(1, b'x' * 65537)\nos._exit(0)"
    cut = "x" * 65536 + "\n[stopped after 65,536 bytes of output]\n", False
    assert [sandbox.run(code) for _ in range(30)] == [cut] * 30


@isolated
def test_sets_have_the_same_order_in_every_run():
    assert sandbox.run("print(hash('a'))")[0] == sandbox.run("print(hash('a'))")[0]


@isolated
def test_a_worker_that_is_killed_fails_its_program_alone(monkeypatch):
    """As by the kernel, when memory runs out."""
    ask, slow = sandbox._ask, "import time\ntime.sleep(5)"

    def killed(worker, job, limits):
        if job["code"] == slow:
            threading.Timer(0.3, worker.kill).start()
        return ask(worker, job, limits)

    monkeypatch.setattr(sandbox, "_ask", killed)
    right = Job("def f():\n    return 1", "assert f() == 1")
    jobs = [right, right, right._replace(code=slow), right, right]
    assert sandbox.passed(jobs) == [True, True, False, True, True]
    assert sandbox.run(slow) == ("[stopped as memory ran out]\n", False)


@isolated
def test_python_behind_a_link_and_in_tmp(monkeypatch):
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        link = Path(folder, "python")
        link.symlink_to(Path(folder, "again"))
        Path(folder, "again").symlink_to(sys.base_prefix)
        monkeypatch.setattr(sandbox.sys, "base_prefix", str(link))
        monkeypatch.setattr(sandbox.sys, "base_exec_prefix", str(link))
        output = sandbox.run(f"import random, os\nprint(len(os.listdir('{link}/bin')) > 0)")
        assert output == ("True\n", True)
    monkeypatch.syspath_prepend("/tmp/venv/site-packages")
    with pytest.raises(InputError, match="cannot use Python's /tmp/venv/site-packages: put"):
        sandbox.check()


@isolated
def test_names_of_the_setup_are_the_tests_own_but_for_the_entry():
    setup = "def double(x):\n    return 2 * x\ndef f(x):\n    ..."
    assert passed("def f(x):\n    return x + x", "assert f(3) == double(3)", setup=setup, entry="f")
    # were double the program's, this would pass
    fake = "def f(x):\n    return 0\ndef double(x):\n    return 0"
    assert not passed(fake, "assert f(3) == double(3)", setup=setup, entry="f")


@isolated
def test_programs_run_beside_each_other_in_their_order():
    jobs = []
    for i in range(12):
        slow = "import time\ntime.sleep(0.2)\n" if i % 4 == 0 else ""
        jobs.append(Job(f"{slow}def f():\n    return {i}", f"assert f() == {i - (i % 3 == 2)}"))
    assert sandbox.passed(jobs) == [i % 3 != 2 for i in range(12)]
    assert sandbox.passed([]) == []


# ------------------------------------------------------------------------------------------ hostile
@isolated
def test_no_program_forges_a_verdict():
    """Each of these passes where the tests run in its own process."""
    for name, code in FORGERIES.items():
        text = f"import math\n{code}\n{CHECK}"
        naive = subprocess.run([sys.executable, "-c", text], capture_output=True, timeout=30)
        assert naive.returncode == 0, (name, naive.stderr)
    jobs = [Job(code, CHECK) for code in FORGERIES.values()]
    right = (
        f"def f(x):\n    return '{SECRET}'\ndef g(x):\n    return 4\ndef h():\n    return [1, 2]"
    )
    assert sandbox.passed([*jobs, Job(right, CHECK)]) == [False] * len(jobs) + [True]


def descendants() -> set[int]:
    """The processes below this one that have not ended, if it also gets their orphans."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = status.read_text().rpartition(")")[2].split()[:2]
        except (OSError, ProcessLookupError):  # it has just ended
            continue
        if state not in "ZX":
            parents[int(status.parent.name)] = int(parent)
    found = set()
    for process in parents:
        line = [process]
        while line[-1] in parents:
            line.append(parents[line[-1]])
        if os.getpid() in line[1:]:
            found.add(process)
    return found


def machine():
    """What a program may not change: processes, mounts, shared memory, listening ports, files."""
    listening = set()
    for name in ("tcp", "tcp6"):
        table = Path("/proc/self/net", name)
        for line in table.read_text().splitlines()[1:] if table.exists() else []:
            if line.split()[3] == "0A" and line.split()[1].endswith(f"{PORT:04X}"):
                listening.add(line.split()[1])
    folders = [Path.home(), Path.cwd(), Path(__file__).parent, Path(tempfile.gettempdir())]
    folders += [Path(name) for name in ("/", "/usr", "/etc", "/var/tmp", "/dev/shm")]
    return {
        "processes": descendants(),
        "mounts": Path("/proc/self/mountinfo").read_text(),
        "segments": Path("/proc/sysvipc/shm").read_text(),
        "queue": ctypes.CDLL(None).mq_unlink(b"/nanopost_was_here") == 0,
        "files": [folder for folder in folders if (folder / "nanopost_was_here").exists()],
        "listening": listening,
        "open": len(os.listdir("/proc/self/fd")),
    }


@pytest.fixture
def as_before(monkeypatch):
    """What happens in a test leaves the machine as it was."""
    libc = ctypes.CDLL(None)
    libc.prctl(36, 1, 0, 0, 0)  # orphans among this process's descendants become its children
    monkeypatch.setenv("NANOPOST_SECRET", SECRET)
    machine()  # a queue that was left is gone
    before = machine()
    yield
    after = machine()
    libc.prctl(36, 0, 0, 0, 0)
    assert after == before


@isolated
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_does_no_harm(name, as_before):
    code, expected = HOSTILE[name]
    output, ok = sandbox.run(code, QUICK if "seconds" in expected else sandbox.DEFAULT)
    assert re.fullmatch(expected, output.removesuffix("\n")), output[-2000:]
    assert not (ok and "stopped" in output)


@isolated
def test_hostile_programs_pass_no_test(as_before):
    ends = [code for code, expected in HOSTILE.values() if "seconds" not in expected]
    jobs = [Job(f"{code}\n{WRONG}", CHECK) for code in [*ends, HOSTILE["fork bomb"][0]]]
    jobs += [Job("\0", CHECK), Job("def f(:", CHECK), Job("", CHECK)]
    assert not any(sandbox.passed(jobs, Limits(seconds=0.4)))


@isolated
def test_the_memory_of_a_folder_is_free_after_its_program(as_before):
    def shared():
        return int(re.search(r"Shmem:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024

    code = "import os\nopen('a', 'wb').write(bytes(2**28))\nprint(os.path.getsize('a'))"
    before = shared()
    for _ in range(2):
        assert sandbox.run(code, Limits(folder=2**29, file=2**29)) == (f"{2**28}\n", True)
    assert shared() < before + 2**27


# Programs that define the right functions, but answer the tester's requests themselves: reply N.
REPLIES = """
import json, os
def reply(data):
    os.write(4, len(data).to_bytes(4, 'big') + data)
def f(x):
    ATTACK
    os._exit(0)
"""
ATTACKS = {
    "claims to have passed": "os.write(4, b'+'); [os.write(n, b'+') for n in range(3)]",
    "a message without end": "os.write(4, b'\\xff' * 5)",
    "no JSON": "reply(b'{')",
    "deep": "reply(b'[' * 200000)",
    "another type": "reply(b'{\"tuple\": 1}')",
    "no type": 'reply(b\'["value", {"eval": "1"}]\')',
    "two types": 'reply(b\'["value", {"tuple": [], "set": []}]\')',
    "unhashable": 'reply(b\'["value", {"set": [[1]]}]\')',
    "a type that is none": 'reply(b\'["value", {"type": "eval"}]\')',
    "a large range": 'reply(b\'["value", {"range": [0, 99999999999999, 1]}]\')',
    "an error that ends": "reply(b'[\"SystemExit\", 0]')",
    "an error that is none": 'reply(b\'["eval", "1"]\')',
    "nothing": "os.close(4)",
}


@isolated
def test_no_reply_confuses_the_tester():
    jobs = [
        Job(REPLIES.replace("ATTACK", x), "assert len(list(f(1))) == 3") for x in ATTACKS.values()
    ]
    honest = REPLIES.replace("ATTACK", "reply(b'[\"value\", [1, 2, 3]]'); return")
    assert sandbox.passed([*jobs, Job(honest, jobs[0].tests)]) == [False] * len(jobs) + [True]
    # an array whose memory is at an address that the program gives: of the tester's own 7
    code = """
class Array:
    __array_interface__ = {
        "version": 3, "shape": (1,), "typestr": "<u4", "data": (id(7) + 24, True),
    }
def f():
    return Array()
"""
    there = {}
    exec(code, there)
    assert numpy.asarray(there["f"]()).tolist() == [7]
    assert not passed(code, "import numpy\nassert numpy.asarray(f()).tolist() == [7]")


@isolated
def test_a_program_cannot_reach_a_server_of_this_machine():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)"
        with socket.create_connection(("127.0.0.1", port), 1):
            server.accept()[0].close()  # this process can
        output, ok = sandbox.run(code)
        assert not ok and "PermissionError" in output
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind("\0nanopost_server")
        code = "import socket\na, b = socket.socketpair(type=socket.SOCK_DGRAM)\n"
        code += "a.connect('\\0nanopost_server')\na.send(b'hello')\n"
        exec(code, {})  # this process can
        assert server.recv(9) == b"hello"
        output, ok = sandbox.run(code)
        assert not ok and "ConnectionRefusedError" in output


@isolated
def test_a_run_that_is_killed_leaves_no_program(as_before):
    """Its worker, keeper and tester die with it, and so all programs."""
    code = "from nanopost.sandbox import Limits, run; "
    code += "run('import time; time.sleep(99)', Limits(seconds=90))"
    before = descendants()
    run = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1])
    deadline = time.monotonic() + 30
    while len(descendants() - before) < 5:  # the run, worker, keeper, tester, program
        assert time.monotonic() < deadline
        time.sleep(0.05)
    run.kill()
    run.wait()
    while descendants() != before:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def without_namespaces(function) -> list[str]:
    """The lines that a function prints in a process whose kernel refuses it namespaces."""

    def refused():
        if ctypes.CDLL(None).unshare(0x10000000) == 0:  # of its own, with a limit of none below
            Path("/proc/sys/user/max_user_namespaces").write_text("0")
        function()

    return in_a_child(refused)


def in_a_child(function) -> list[str]:
    """The lines that a function prints in another process."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(write_end, 1)
        sys.stdout = open(1, "w", encoding="utf8")
        try:
            function()
        finally:
            sys.stdout.flush()
            os._exit(0)
    os.close(write_end)
    with open(read_end, encoding="utf8") as file:
        lines = file.read().splitlines()
    os.waitpid(child, 0)
    return lines


@isolated
@pytest.mark.skipif(os.geteuid() != 0, reason="only root has groups to leave")
def test_programs_of_root_leave_its_groups():
    def groups():
        os.setgroups([4, 27])
        print(sandbox.run("import os\nprint(os.getgroups())"))

    assert in_a_child(groups) == ["('[]\\n', True)"]


@pytest.mark.parametrize("ends", ["time.sleep(99)", "os._exit(0)"])
def test_unsafe_programs_leave_no_process(ends, as_before):
    daemon = "if not os.fork():\n    os.setsid()\n    if not os.fork():\n        time.sleep(99)\n"
    code = f"import os, time\n{daemon}    time.sleep(99)\ntime.sleep(0.2)\n{ends}"
    assert sandbox.run(code, QUICK, isolated=False)[1] == (ends != "time.sleep(99)")


def test_without_namespaces_code_is_refused_but_for_unsafe_code():
    right, wrong = "def f(x):\n    return x + 1", "import time\ntime.sleep(99)"

    def tries():
        try:
            rewards.load(["code"], None)
        except InputError as error:
            print(error)
        [reward], _ = rewards.load(["code"], None, isolated=False)
        print(reward.function([right, "f = abs", "1 / 0"], tests=["assert f(1) == 2"] * 3))
        print(sandbox.run(wrong, QUICK, isolated=False))
        print(sandbox.run("import os\nprint(len(os.environ) < 12)", isolated=False))

    refused, warned, scores, stopped, environment = without_namespaces(tries)
    assert refused.startswith("the sandbox fails (") and refused.endswith("this user's rights.")
    assert "unshare: " in refused and "--unsafe_code runs programs without it" in refused
    assert warned == "warning: --unsafe_code: sampled programs run with this user's rights"
    assert scores == "[1.0, 0.0, 0.0]"
    assert stopped == str(("[stopped after 0.6 seconds]\n", False))
    assert environment == str(("True\n", True))


# ------------------------------------------------------------------------------------- the reward
@pytest.mark.parametrize(
    "text, program",
    [
        ("x = 1", "x = 1"),
        ("Here:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```py\nx = 1\n```\nor\n```Python3\ny = 2\n```", "y = 2\n"),
        ("```python\nx = 1\n```\n```\nx\n```", "x = 1\n"),
        ("```python\nx = '```'\n```", "x = '```'\n"),
        ("1.\n   ```python\n   if x:\n       y\n   ```", "if x:\n    y\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```sh\nls\n```\n```\nx = 1\n```\n```text\n1\n```", "x = 1\n"),
        ("```python\r\nx = 1\r\n```\r\n", "x = 1\n"),
        ("```python\ndef f():\n    pass\n```\nUse:\n```python\nf()\n```", "def f():\n    pass\n"),
        ('def f():\n    """\n```\nx\n```\n"""', 'def f():\n    """\n```\nx\n```\n"""'),
        ("```python\nx = 1", "```python\nx = 1"),  # cut off
        ("", ""),
    ],
)
def test_the_program_of_a_completion(text, program):
    assert verify.program(text) == program


PROMPT = 'from math import floor\n\ndef half(x):\n    return x / 2\n\ndef f(x):\n    """Twice."""\n'
HUMAN = {
    "test": ["def check(candidate):\n    assert candidate(2) == 4\n    assert half(f(3)) == 3"],
    "entry_point": ["f"],
}


@isolated
def test_a_body_continues_the_prompt_and_a_block_stands_alone():
    table = {
        "    return 2 * x\n": 1,
        "    return half(4 * x)\n": 1,
        "    return 4\n": 0,
        "    return 2 * x\n\nprint('more')\n": 1,
        "    return 2 * x\n\ndef fast(x):\n    return 1\n": 1,
        "    return 2 * x\n\ndef other(x):\n    return (x +": 1,  # cut off
        "```python\ndef f(x):\n    return x + x\n```": 1,
        "```python\ndef f(x):\n    return floor(2 * x)\n```": 1,  # with the prompt's imports
        "```python\nfrom __future__ import annotations\ndef f(x):\n    return 2 * x\n```": 1,
        "```python\ndef f(x):\n    return half(4 * x)\n```": 0,  # stands alone
        "```python\n    return 2 * x\n```": 1,
        "    return 2 *": 0,
        "return (": 0,
        "": 0,
    }
    texts, scores = list(table), list(table.values())
    columns = {name: column * len(table) for name, column in HUMAN.items()}
    assert verify.code(texts, [PROMPT] * len(table), **columns) == scores
    chat = [{"role": "user", "content": f"Complete:\n```python\n{PROMPT}```"}]
    answers = [[{"role": "assistant", "content": text}] for text in texts]
    assert verify.code(answers, [chat] * len(table), **columns) == scores


@isolated
def test_a_prompt_in_words_is_no_program():
    chat = [{"role": "user", "content": "Write f, which doubles, and half!"}]
    answer = "```python\ndef half(x):\n    return x\ndef f(x):\n    return 2 * x\n```"
    test = {"test": ["def check(g):\n    assert g(2) == 4"] * 2, "entry_point": ["f"] * 2}
    assert verify.code([answer, "    return 2 * x"], [chat] * 2, **test) == [1, 0]
    # what a star hides is not the program's either
    test["test"] = ["from math import *\ndef check(g):\n    assert half(g(2)) == 4"] * 2
    assert verify.code([answer], [chat], test=test["test"][:1], entry_point=["f"]) == [0]
    with pytest.raises(InputError, match="the tests use half, which neither they nor the prompt"):
        verify.code([answer], [chat], **HUMAN)


@isolated
def test_columns_of_each_kind_are_tests():
    right, wrong = "def add(a, b):\n    return a + b", "def add(a, b):\n    return a - b"
    for columns in (
        {"test_list": ["assert add(1, 2) == 3"]},
        {"test_list": ["assert add(ONE, 2) == 3"], "test_setup_code": "ONE = 1"},
        {"test_list": ["assert add(os.cpu_count(), 2) > 2"], "test_imports": ["import os"]},
        {"test_list": ["assert add(os.cpu_count(), 2) > 2"], "test_imports": "import os"},
        {"tests": "check()", "test_setup_code": "def check():\n    assert add(1, 2) == 3"},
        {"tests": "assert add(1, 2) == 3"},
        {"tests": ["x = 1", "assert add(x, 2) == 3"]},
        {"tests": "def test_add():\n    assert add(1, 2) == 3"},
    ):
        columns = {name: [value] * 2 for name, value in columns.items()}
        assert verify.code([right, f"{wrong}\ndef check():\n    pass"], **columns) == [1, 0], (
            columns
        )
    # a name that is Python's too
    assert verify.code(
        ["def sum(a, b):\n    return a - b"], test_list=[["assert sum(2, 2) == 0"]]
    ) == [1]


ROW = {"prompt": "?", "__line__": "data.jsonl:3"}


@pytest.mark.parametrize(
    "columns, error",
    [
        ({}, "has no tests: it needs the column tests, or test_list .* --rename theirs=tests"),
        ({"test": "assert f(1)"}, "has no tests"),
        ({"tests": 5}, "tests are a text or a list of texts"),
        ({"test_list": [1]}, "tests are a text or a list of texts"),
        ({"tests": "assert f(1) =="}, "the tests are not Python: invalid syntax"),
        ({"tests": []}, "the tests run nothing: write statements, such as assert"),
        ({"tests": "class TestF:\n    def test(self):\n        assert f(1)"}, "run nothing"),
        ({"tests": "def check(f):\n    assert f(1)"}, "run nothing"),
        ({"tests": "async def test_f():\n    assert f(1)"}, "test_f has parameters, or is async"),
        ({"tests": "def test_f():\n    yield\n    assert f(1)"}, "or is async or a generator"),
        ({"tests": "def test_f(tmp_path):\n    assert f(1)"}, "test_f has parameters"),
        ({"tests": "from solution import f\nassert f(1)"}, "the tests import solution, which is"),
        ({"tests": "from .a import f\nassert f(1)"}, "the tests import .a, which is"),
        ({"test": "def check(f):\n    f(g)", "entry_point": "f"}, "the tests use g, which neither"),
        ({"tests": '["assert f(1)"]'}, "an empty program passes the tests"),
        ({"tests": "1 == 2"}, "jsonl:3: Reward code: an empty program passes the tests"),
        ({"tests": "try:\n    assert f(1)\nexcept Exception:\n    pass"}, "an empty program"),
        ({"tests": "class T:\n    pass\nif __name__ == '__main__':\n    f()"}, "an empty program"),
    ],
)
def test_a_row_without_tests_is_refused_before_training(columns, error):
    reward = rewards.Reward("code", verify.unsafe_code)
    with pytest.raises(InputError, match=error):
        rewards.check([reward], [ROW | columns])


def test_rows_of_tests_are_tried_before_training(capsys):
    reward = rewards.Reward("code", verify.unsafe_code)
    prompt = 'def g():\n    return 1\n\ndef f(x):\n    """Calls g."""\n'
    human = {"prompt": prompt, "test": "def check(f):\n    f(g)", "entry_point": "f"}
    rows = [ROW | {"tests": "assert f(1)"}, ROW | human]
    assert rewards.check([reward], rows) == "" and capsys.readouterr().out == ""
    assert rewards.check([reward], rows * 101) == ""
    assert "the tests of 101 of 202 rows were tried" in capsys.readouterr().out


def test_scripts_load_rewards_by_their_flags():
    """So each of them isolates programs unless --unsafe_code is given."""
    for script in Path(__file__).parents[1].glob("train_*.py"):
        text = script.read_text(encoding="utf8")
        assert "rewards.load(" not in text, script
        assert ("cli.load_rewards(args, " in text) == ("rewards.check(" in text), script


def test_the_flag_unsafe_code_reaches_the_reward(capsys):
    parser = cli.parser("", out="out", lr=1.0)
    cli.add_rollout_flags(parser)
    given = ["--data", "d", "--model", "m", "--reward", "exact", "code"]
    [_, reward], weights = cli.load_rewards(
        parser.parse_args([*given, "--unsafe_code"]), None, None
    )
    assert reward.function is verify.unsafe_code and weights == [1.0, 1.0]
    assert "warning: --unsafe_code" in capsys.readouterr().out
    if not REASON:
        [_, reward], _ = cli.load_rewards(parser.parse_args(given), None, None)
        assert reward.function is verify.code


@isolated
def test_grpo_trains_on_what_programs_are_worth(tmp_path):
    """A random model continues one program in a comment, where little is wrong, and one not."""
    toy.write_model(tmp_path / "model")
    row = {"test": "def check(f):\n    assert f(-2) == 2", "entry_point": "f"}
    prompts = [f"f = abs{end}" for end in ("  # ", "") for _ in range(4)]
    toy.write_rows(tmp_path / "rows.jsonl", [{"prompt": prompt, **row} for prompt in prompts])
    files = ("--model", tmp_path / "model", "--data", tmp_path / "rows.jsonl", "--out", tmp_path)
    size = ("--steps", 4, "--prompts", 2, "--group", 4, "--max_new_tokens", 2, "--eval_every", 0)
    size += ("--holdout", 1, "--minibatches", 1)
    run_here("train_grpo.py", *files, *size, "--reward", "code", "--device", "cpu", "--overwrite")
    scores = set()
    for line in (tmp_path / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        scores.add(sample["reward"])
        program = sample["prompt"] + sample["completion"]
        expected = is_right(program) or is_right(program.rpartition("\n")[0])  # without what is cut
        assert sample["reward"] == float(expected), sample
    assert scores == {0.0, 1.0}


def is_right(program):
    names = {}
    try:
        exec(program, names)
        return names["f"](-2) == 2
    except Exception:
        return False


def test_unsafe_code_without_code_is_refused():
    with pytest.raises(InputError, match="--unsafe_code is about --reward code"):
        rewards.load(["exact"], None, isolated=False)


# ----------------------------------------------------------------------------------- real programs
class Mutant(ast.NodeTransformer):
    """Each function returns something else."""

    def visit_Return(self, node):
        node.value = ast.Tuple([node.value or ast.Constant(None), ast.Constant(0)], ast.Load())
        return node


def mutant(code):
    return ast.unparse(ast.fix_missing_locations(Mutant().visit(ast.parse(code))))


def columns_of(rows, *names):
    return {name: [row[name] for row in rows] for name in names}


@isolated
def test_solutions_of_humaneval_pass_and_mutants_fail(shared):
    """Each sixth; bench/code.py runs them all."""
    text = gzip.decompress((shared / "tasks/humaneval.jsonl.gz").read_bytes()).decode()
    rows = [json.loads(line) for line in text.splitlines()][::6]
    columns = columns_of(rows, "test", "entry_point")
    prompts = [row["prompt"] for row in rows]
    assert (
        verify.code([row["canonical_solution"] for row in rows], prompts, **columns) == [1.0] * 28
    )
    mutants = [mutant(row["prompt"] + row["canonical_solution"]) for row in rows]
    assert verify.code(mutants, prompts, **columns) == [0.0] * 28


@isolated
def test_solutions_of_mbpp_pass_and_mutants_fail(shared):
    """Each thirtieth, and those with a class, a type and a name of Python's."""
    lines = (shared / "tasks/mbpp.jsonl").read_text(encoding="utf8").splitlines()
    rows = [json.loads(line) for line in lines]
    rows = rows[::30] + [row for row in rows if row["task_id"] in (126, 367, 533, 596, 927)]
    columns = columns_of(rows, "test_list", "test_setup_code")
    assert set(verify.code([row["code"] for row in rows], **columns)) == {1.0}
    assert set(verify.code([mutant(row["code"]) for row in rows], **columns)) == {0.0}
