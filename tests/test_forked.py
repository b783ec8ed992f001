"""Forks end as processes of python do: no failure is lost, nothing runs on, and the library is that
of the script's folder."""

import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
from scripts import ENVIRONMENT

HERE = Path(__file__).parent


def script(folder, text) -> Path:
    path = folder / "script.py"
    path.write_text(text)
    return path


def is_there(pid: Path) -> bool:
    return pid.exists() and Path("/proc", pid.read_text()).exists()


ENDS = {
    "print('said')": (0, "said", ""),
    "import sys; print('said'); sys.exit(3)": (3, "said", ""),
    "import sys; sys.exit('a sentence')": (1, "", "a sentence"),
    "import sys; sys.excepthook = lambda *error: print('told'); 1 / 0": (1, "told", ""),
    "1 / 0": (1, "", "ZeroDivisionError: division by zero"),
    "import os; os._exit(4)": (4, "", ""),
    "import os; os.kill(os.getpid(), 9)": (-9, "", ""),
    "import atexit; atexit.register(print, 'at last')": (0, "at last", ""),
}


@pytest.mark.parametrize("text", ENDS)
def test_a_fork_ends_as_python_does(text, tmp_path):
    done = forked.run([script(tmp_path, text)], ENVIRONMENT)
    status, out, err = ENDS[text]
    assert (done.returncode, done.stdout.strip()) == (status, out)
    assert done.stderr.strip().endswith(err) and bool(done.stderr) == bool(err)


PID = """
import os, sys, time
rank = os.environ.get("RANK", "")
open(sys.argv[1] + rank, "w").write(str(os.getpid()))
"""


@pytest.mark.parametrize("failing", ["0", "1"])
@pytest.mark.parametrize("others", ["time.sleep(100)", "pass"])
def test_a_rank_that_fails_ends_all_of_them(failing, others, tmp_path):
    """While the others wait, or when they have ended."""
    fails = f"if rank == {failing!r}:\n    time.sleep(1)\n    sys.exit(5)\n"
    began = time.monotonic()
    given = script(tmp_path, PID + fails + others)
    done = forked.run([given, tmp_path / "pid"], ENVIRONMENT, ranks=2)
    assert done.returncode == 5 and time.monotonic() - began < 60
    assert not any(is_there(tmp_path / f"pid{rank}") for rank in range(2))


def test_a_run_that_is_late_is_no_success(tmp_path):
    given = script(tmp_path, PID + "print('said', flush=True)\ntime.sleep(100)")
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        forked.run([given, tmp_path / "pid"], ENVIRONMENT, timeout=3)
    assert caught.value.stdout == "said\n" and not is_there(tmp_path / "pid")


def test_tests_that_fail_wait_for_no_fork(tmp_path):
    """What they have started is killed where python ends, which would wait for it."""
    given = script(tmp_path, PID + "time.sleep(100)")
    (tmp_path / "tests.py").write_text(f"""
import os, sys, time
sys.path.insert(0, {str(HERE)!r})
import forked
if __name__ == "__main__":
    forked.FORKS.set_forkserver_preload([])
    command = [{str(given)!r}, {str(tmp_path / "pid")!r}]
    forked.start(forked.python, "out", "err", command, dict(os.environ))
    while not os.path.exists({str(tmp_path / "pid")!r}):
        time.sleep(0.01)
    assert False
""")
    done = subprocess.run([sys.executable, "tests.py"], cwd=tmp_path, timeout=60)
    assert done.returncode == 1
    deadline = time.monotonic() + 10
    while is_there(tmp_path / "pid"):
        assert time.monotonic() < deadline
        time.sleep(0.01)


WHERE = "import nanopost; print(nanopost.__file__)"


@pytest.mark.parametrize("how", ["script", "module", "PYTHONPATH"])
def test_the_library_is_that_of_the_copy(how, tmp_path):
    """Not that of the tests, which is where they find theirs."""
    (tmp_path / "nanopost").mkdir()
    copy = tmp_path / "nanopost" / "__init__.py"
    copy.touch()
    (tmp_path / "elsewhere").mkdir()
    given, env = script(tmp_path, WHERE), dict(ENVIRONMENT)
    if how == "script":
        done = forked.run([given], env)
    elif how == "module":
        done = forked.run(["-m", "script"], env, cwd=tmp_path)
    else:
        env["PYTHONPATH"] = str(tmp_path)
        done = forked.run([script(tmp_path / "elsewhere", WHERE)], env)
    assert done.stdout == f"{copy}\n", done.stderr


def test_without_a_copy_there_is_no_library(tmp_path):
    env = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}
    done = forked.run([script(tmp_path, WHERE)], env)
    assert done.returncode == 1 and "No module named 'nanopost'" in done.stderr


def test_forks_draw_other_numbers(tmp_path):
    """As processes do: what nobody has seeded is not reproducible by chance."""
    given = script(tmp_path, "import random, numpy\nprint(random.random(), numpy.random.rand())")
    one, two = (forked.run([given], ENVIRONMENT).stdout.split() for _ in range(2))
    assert one[0] != two[0] and one[1] != two[1]
