r"""Programs that try to harm the machine, and what each of them prints in the sandbox; programs
that try to pass tests without being right.

#### begins a program, with its name. #: lines are a pattern of its whole output, without the last
newline. A program that harms has ctypes, os, signal, sys, time, and `call`: a function of libc, its
result or its error.
"""

PORT = 47813
PRELUDE = """
import ctypes, os, signal, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *values):
    result = getattr(libc, name)(*values)
    return result if result >= 0 else os.strerror(ctypes.get_errno())
"""

TEXT = r"""
#### fork bomb
children = 0
try:
    while True:
        if not os.fork():
            time.sleep(60)
        children += 1
except BlockingIOError:
    print(0 < children < 16)
#: True

#### exponential fork bomb
while True:
    try:
        os.fork()
    except OSError:
        pass
#: \[stopped after .* seconds\]

#### threads
import threading
try:
    while True:
        threading.Thread(target=time.sleep, args=[60], daemon=True).start()
except RuntimeError as error:
    print(error)
#: can't start new thread

#### endless loop
while True:
    pass
#: \[stopped after .* seconds\]

#### sleep
time.sleep(1000)
#: \[stopped after .* seconds\]

#### deaf to signals
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
time.sleep(1000)
#: \[stopped after .* seconds\]

#### stops itself
os.kill(os.getpid(), signal.SIGSTOP)
#: \[stopped after .* seconds\]

#### gigabytes of output
while True:
    print("x" * 10**6)
#: x{65536}
#: \[stopped after 65,536 bytes of output\]

#### output of children
import subprocess
for _ in range(3):
    subprocess.Popen(["/usr/bin/yes"])
time.sleep(60)
#: [y\n]{60000,}
#: \[stopped after 65,536 bytes of output\]

#### memory
bytearray(10**10)
#: (.|\n)*MemoryError

#### memory in a loop
parts = []
while True:
    parts.append("x" * 10**7)
#: (.|\n)*MemoryError

#### huge integer
x = 7
while True:
    x *= x
#: (.|\n)*(MemoryError|\[stopped after .* seconds\])

#### memory outside of processes
print(call("memfd_create", b"x", 0))
print(call("shmget", 0, 10**9, 0o1600))
print(call("semget", 0, 32000, 0o1600))
print(call("msgget", 0, 0o1600))
#: (Operation not permitted\n){3}Operation not permitted

#### a queue
print(call("mq_open", b"/nanopost_was_here", os.O_RDWR | os.O_CREAT, 0o666, None) >= 0)
#: True

#### fills the folder
files = 0
try:
    while True:
        with open(f"/tmp/{files}", "wb") as file:
            file.write(bytes(10**7))
        files += 1
except OSError as error:
    print(files < 7, error.strerror)
#: True No space left on device

#### large file
file = open("a", "wb", buffering=0)
try:
    while True:
        file.write(bytes(10**6))
except OSError as error:
    print(error.strerror)
#: File too large

#### many files
files = 0
try:
    while True:
        open(f"/tmp/{files}", "w").close()
        files += 1
except OSError as error:
    print(files < 4096, error.strerror)
#: True No space left on device

#### many open files
files = []
try:
    while True:
        files.append(open("/dev/null"))
except OSError as error:
    print(len(files) < 64, error.strerror)
#: True Too many open files

#### writes everywhere
import glob
for path in ["/", *glob.glob("/*"), *glob.glob("/*/*"), *glob.glob("/*/*/*")]:
    target = os.path.join(path, "nanopost_was_here") if os.path.isdir(path) else path
    if path.startswith("/dev/"):
        continue
    try:
        open(target, "ab").close()
        print(target)
    except OSError:
        pass
for path in glob.glob("/dev/*"):
    try:
        os.remove(path)
        print(path)
    except OSError:
        pass
#: /tmp/nanopost_was_here

#### looks around
for path in ["/proc", "/sys", "/run", "/etc/passwd", "/etc/shadow", "/var", "/home", HERE]:
    if os.path.exists(path):
        print(path)
print([name for name in os.environ if "SECRET" in name], sys.argv, os.listdir("/tmp"))
#: \[\] \['program.py'\] \[\]

#### links out
os.symlink("/", "root")
print(sorted(os.listdir("root/tmp")))
for path in ["root/etc/passwd", "../../etc/passwd", "root/proc/1/root"]:
    if os.path.exists(path):
        print(path)
try:
    os.link("/dev/null", "null")
except OSError as error:
    print(error.strerror)
#: \['root'\]
#: (Invalid cross-device link|Operation not permitted)

#### other processes
print(os.getppid())
for pid in [1, *range(3, 40000)]:
    try:
        os.kill(pid, 0)
        print(pid)
    except ProcessLookupError:
        pass
#: 1
#: 1

#### signals to all
for number in range(1, 65):
    for pid in (1, -1):
        try:
            os.kill(pid, number)
        except OSError:
            pass
print("still here")
#: still here

#### signals to its group
os.killpg(0, signal.SIGKILL)
#:

#### looks into its tester
class Part(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
page = ctypes.create_string_buffer(64)
mine = ctypes.byref(Part(ctypes.addressof(page), 64))
print(call("process_vm_readv", 1, mine, 1, mine, 1, 0))
print(call("process_vm_writev", 1, mine, 1, mine, 1, 0))
print(call("ptrace", 16, 1, 0, 0))
tester = call("syscall", 434, 1, 0)  # pidfd_open
print(call("syscall", 438, tester, 0, 0))  # pidfd_getfd
#: Operation not permitted
#: Operation not permitted
#: Operation not permitted
#: Operation not permitted

#### becomes another
print(os.getresuid(), os.getresgid())
print(call("setuid", 0), call("setgid", 0))
#: \(65534, 65534, 65534\) \(65534, 65534, 65534\)
#: (Operation not permitted|Invalid argument) (Operation not permitted|Invalid argument)

#### new namespaces
for bit in (17, 26, 27, 28, 29, 30):
    print(call("unshare", 1 << bit))
print(call("mount", b"tmpfs", b"/tmp", b"tmpfs", 0, None))
print(call("umount2", b"/tmp", 2))
print(call("chroot", b"/tmp"))
print(call("sethostname", b"x", 1))
#: (Operation not permitted\n){9}Operation not permitted

#### raises its limits
import resource
for name in ("AS", "CPU", "FSIZE", "NOFILE", "NPROC", "CORE"):
    for pid in (0, 1):
        try:
            resource.prlimit(pid, getattr(resource, "RLIMIT_" + name), (2**40, 2**40))
            print(name)
        except (ValueError, PermissionError):
            pass
#:

#### sockets
import socket
for family in range(1, 46):
    for kind in (1, 2, 3, 5):
        try:
            print(socket.socket(family, kind))
        except PermissionError:
            pass
#:

#### a server
import socket
try:
    socket.create_server(("", PORT))
except PermissionError as error:
    print(error.strerror)
#: Operation not permitted

#### other ways to sockets
machine = os.uname().machine
print(call("syscall", 425, 1, 0))  # io_uring_setup
print(call("syscall", {"x86_64": 321, "aarch64": 280}[machine], 0, 0, 0))  # bpf
print(call("syscall", 0x40000029, 1, 1, 0))  # x86's other ABI
#: Operation not permitted
#: Operation not permitted
#: Operation not permitted

#### calls that attack kernels
numbers = {"x86_64": (248, 249, 250, 298, 323, 447), "aarch64": (217, 218, 219, 241, 282, 447)}
for number in numbers[os.uname().machine]:
    print(call("syscall", number, 0, 0, 0, 0, 0))
#: (Operation not permitted\n){5}Operation not permitted

#### daemon
if not os.fork():
    os.setsid()
    if not os.fork():
        time.sleep(3600)
    os._exit(0)
#:

#### zombies
for _ in range(8):
    if not os.fork():
        os._exit(0)
print("done")
#: done

#### deep recursion
sys.setrecursionlimit(10**9)
def f(x):
    return [f(x)]
f(1)
#: (.|\n)*(\[stopped after .* seconds\])?

#### closes its files
os.closerange(0, 1000)
os.fork()
#:

#### odd output
os.write(1, bytes(range(128, 256)) + b"\x1b[2J\0+")
#: [^a-z]+\x1b\[2J\0\+

#### text that is no text
print("\ud800")
#: (.|\n)*UnicodeEncodeError: .*

#### a module in place of a standard one
for name in ("json", "math", "random"):
    with open(f"/tmp/{name}.py", "w") as file:
        file.write("print('mine')\n")
import random
#:
"""

# Tests, what no right program does, and how each program would pass if it ran in their process.
SECRET = "token_8f3a96c1"
CHECK = f"assert f(3) == '{SECRET}' and math.isclose(abs(g(2)), 4.0) and len(h()) == 2"
WRONG = """
def f(x):
    return ""
def g(x):
    return 1
def h():
    return []
"""
FORGED = r"""
#### ends with success
import sys
sys.exit(0)

#### ends at once with success
import os
print("ok")
os._exit(0)

#### ends with success at exit
import atexit, os
atexit.register(os._exit, 0)

#### hides errors
import os, sys
sys.excepthook = lambda *_: os._exit(0)

#### forks and ends the parent
import os
if os.fork():
    os._exit(0)

#### ends from a thread
import os, threading, time
threading.Thread(target=lambda: os._exit(0)).start()
time.sleep(0.1)

#### equals everything
class All:
    __eq__ = lambda *_: True
    __abs__ = lambda self: 4.0
    __len__ = lambda self: 2
f = g = h = lambda *_: All()

#### is a text that equals everything
class Text(str):
    __eq__ = lambda *_: True
    __hash__ = str.__hash__
    __len__ = lambda self: 2
f = lambda x: Text()
g = lambda x: 4
h = lambda: Text()

#### replaces Python's functions
import builtins, math
class All:
    __eq__ = lambda *_: True
builtins.len = lambda x: 2
builtins.abs = lambda x: 4.0
math.isclose = lambda *_: True
f = lambda x: All()

#### defines Python's names
class All:
    __eq__ = lambda *_: True
class math:
    isclose = lambda *_: True
abs = lambda x: 4.0
len = lambda x: 2
f = lambda x: All()

#### reads the tests
import gc, re, sys
def f(x):
    texts = [open("/proc/self/cmdline").read()]
    texts += [text for text in gc.get_objects() if isinstance(text, str)]
    frame = sys._getframe()
    while frame:
        texts += map(repr, [*frame.f_code.co_consts, frame.f_globals])
        frame = frame.f_back
    return re.search("token_[0-9a-f]{8}", " ".join(texts))[0]
g = lambda x: 4
h = lambda: [1, 2]
"""


def programs(text):
    """name -> (code, pattern) of the programs in a text."""
    found = {}
    for part in text.split("\n#### ")[1:]:
        name, *lines = part.split("\n")
        code = [line for line in lines if not line.startswith("#:")]
        pattern = [line[3:] for line in lines if line.startswith("#:")]
        found[name] = "\n".join(code), "\n".join(pattern)
    return found


HOSTILE = {}
for name, (code, pattern) in programs(TEXT).items():
    code = code.replace("HERE", repr(__file__)).replace("PORT", str(PORT))
    HOSTILE[name] = PRELUDE + code, pattern
FORGERIES = {name: WRONG + code for name, (code, _) in programs(FORGED).items()}
