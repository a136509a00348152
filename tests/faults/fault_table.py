"""The faults: what a workload does to its process, and what a user of ``autobatch probe`` then sees."""

from __future__ import annotations

import dataclasses
import sys
import textwrap

HEADER = """
import atexit, ctypes, os, resource, signal, subprocess, sys, threading, time
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

WORKER = os.getpid()  # the step is also traced, in processes apart: faults are for the trials
KEPT, START = [], os.getcwd()

class Rows(Dataset):
    def __len__(self): return 64
    def __getitem__(self, index): return torch.ones(1)

class Step(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(262144))
    def forward(self, x):
        if len(x) >= 4 and os.getpid() == WORKER:
            act()
        return (x * self.weight).square().mean()
"""
FOOTER = """
def build():
    load()
    return {"model": Step(), "sample": torch.ones(1, 1), "step": lambda net, x: net(x), "optimizer": torch.optim.SGD}
"""
SLEEPER = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])"
DAEMON = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'], start_new_session=True, stderr=subprocess.DEVNULL)"

FORKS = """
[os.fork() for _ in range(5)]
time.sleep(0.1 if os.getpid() == WORKER else 99)
os.kill(WORKER, 9)
"""
LOADER = """
KEPT.append(DataLoader(Rows(), num_workers=2, persistent_workers=True))
next(iter(KEPT[0]))
"""
LOADING = """
KEPT.append(iter(DataLoader(Rows(), num_workers=2)))
next(KEPT[-1])
os.kill(WORKER, 9)
"""
GONE = """
os.makedirs(START + "/gone", exist_ok=True)
os.chdir(START + "/gone")
os.rmdir(START + "/gone")
"""
BUFFERED = (("PYTHONUNBUFFERED", None),)
EXITS = """
class Odd(Exception):
    def __reduce__(self): return sys.exit, (9,)
raise Odd
"""
TORCH_SHARED = """
torch.multiprocessing.set_sharing_strategy("file_system")
KEPT.append(torch.ones(4096).share_memory_())
os.kill(WORKER, 9)
"""
PYTHON_SHARED = """
from multiprocessing.shared_memory import SharedMemory
KEPT.append(SharedMemory(create=True, size=4096))
os.kill(WORKER, 9)
"""


@dataclasses.dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        name: the test's.
        act: what the step does, from 4 rows on.
        load: what the workload does while it is loaded.
        code: the command's exit code.
        says: what its standard error contains, as a pattern.
        options: for the command, beside those that all have.
        environment: variables to set; one that is ``None`` is taken away.
        free: whether the search may go on to where memory ends, so that workers are replaced.
    """

    name: str
    act: str = "pass"
    load: str = "pass"
    code: int = 6
    says: str = ""
    options: tuple[str, ...] = ()
    environment: tuple[tuple[str, str | None], ...] = ()
    free: bool = False

    @property
    def target(self) -> str:
        """The target file's text."""
        act, load = (textwrap.indent(textwrap.dedent(text).strip("\n"), "    ") for text in (self.act, self.load))
        return f"{HEADER}\ndef act():\n{act}\n\ndef load():\n{load}\n{FOOTER}"


def ends(name: str, act: str, how: str, **more: object) -> Fault:
    """Return a fault that ends the worker."""
    return Fault(name, act, says=rf"autobatch: The worker {how} at batch size \d+\. ", **more)  # type: ignore[arg-type]


def hangs(name: str, act: str, **more: object) -> Fault:
    """Return a fault that never comes back."""
    says = r"autobatch: The worker gave no answer within 2 seconds at batch size \d+ and was stopped\. The step may hang"
    return Fault(name, act, says=says, options=("--probe-timeout", "2"), **more)  # type: ignore[arg-type]


def survived(name: str, act: str = "pass", **more: object) -> Fault:
    """Return a fault that does not keep the search from its answer."""
    return Fault(name, act, code=0, says=r"batch size \s*\d+  fits", **more)  # type: ignore[arg-type]


def fails(name: str, act: str, error: str, **more: object) -> Fault:
    """Return a fault that is an error of the user's code."""
    says = rf"(?s){error}.*autobatch: the workload failed at batch size \d+, for reasons of its own \(not memory\)"
    return Fault(name, act, code=5, says=says, **more)  # type: ignore[arg-type]


ENDS = [
    ends("SIGKILL", "os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL"),
    ends("SIGSEGV", "ctypes.string_at(0)", "was killed by SIGSEGV"),
    ends("SIGABRT", "os.abort()", "was killed by SIGABRT"),
    ends("SIGTERM", "os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)", "was killed by SIGTERM"),
    ends("SIGALRM later", "signal.alarm(1); time.sleep(9)", "was killed by SIGALRM"),
    ends("a signal without a name", "os.kill(os.getpid(), 40); time.sleep(9)", "was killed by signal 40"),
    ends("os._exit 7", "os._exit(7)", "ended with exit code 7"),
    ends("os._exit 86, the code of workers that retired once", "os._exit(86)", "ended with exit code 86"),
    ends("sys.exit 3", "sys.exit(3)", "ended with exit code 3"),
    Fault("sys.exit with a text", "sys.exit('no licence')", says=r"(?s)ended with exit code 1 at .*\n  no licence\n"),
    ends("KeyboardInterrupt", "raise KeyboardInterrupt", "was killed by SIGINT"),
    ends("SIGKILL with a thread", "threading.Thread(target=time.sleep, args=(99,)).start(); os.kill(WORKER, 9)", "was killed by SIGKILL"),
    ends("the whole group killed", "os.killpg(0, signal.SIGKILL)", "was killed by SIGKILL"),
    ends("the keeper killed, a daemon left", f"{DAEMON}; os.kill(os.getppid(), signal.SIGKILL); time.sleep(99)", "was killed by SIGKILL"),
    ends("all descriptors closed", "os.closerange(0, 1024)", "lost its pipe to autobatch"),
    Fault(
        "garbage on every descriptor",
        """
        for fd in range(3, 64):
            try: os.set_blocking(fd, False); os.write(fd, b'{"probe": 1\\n')
            except OSError: pass
        time.sleep(99)
        """,
        says=r"autobatch: The worker sent what is no answer at batch size \d+ and was stopped\.",
    ),
    ends("a fork bomb of 31, then SIGKILL", FORKS, "was killed by SIGKILL"),
    Fault("SIGKILL while loading", load="os.kill(os.getpid(), 9)", says="The worker was killed by SIGKILL while loading the workload"),
    Fault("sys.exit while loading", load="sys.exit(4)", says="The worker ended with exit code 4 while loading the workload"),
    Fault(
        "a C stack that overflows",
        "sys.setrecursionlimit(10**9)\ndef down(_): return list(map(down, [0]))\ndown(0)",
        code=6 if sys.version_info < (3, 12) else 5,
        says="was killed by SIGSEGV" if sys.version_info < (3, 12) else "RecursionError",
    ),
]  # fmt: skip
HANGS = [
    hangs("a sleep in C with the interpreter held", "ctypes.PyDLL(None).sleep(1000)"),
    hangs("a read of a pipe nobody writes to", "os.read(os.pipe()[0], 1)"),
    hangs("SIGSTOP", "os.kill(os.getpid(), signal.SIGSTOP)"),
    hangs("the whole group stopped, a daemon left", f"{DAEMON}; os.killpg(0, signal.SIGSTOP)"),
    hangs("SIGTERM and SIGINT ignored", "[signal.signal(n, signal.SIG_IGN) for n in (2, 15)]; time.sleep(1000)"),
    hangs("a DataLoader whose worker sleeps", "next(iter(DataLoader(Rows(), num_workers=1, worker_init_fn=lambda _: time.sleep(1000))))"),
]
SURVIVED = [
    survived("children that stay", SLEEPER),
    survived("daemons in sessions of their own", DAEMON),
    survived("a daemon whose parent ended", f"if os.fork() == 0:\n    os.setsid(); {DAEMON}; os._exit(0)"),
    survived("a fork that comes back twice", "os.fork()"),
    survived("a DataLoader with persistent workers", load=LOADER),
    survived(
        "megabytes on both streams",
        "for fd in (1, 2): os.write(fd, b'x' * 2**20); os.write(fd, b'y\\r' * 2**19 + b'\\n')",
    ),
    survived("the three standard descriptors closed", "os.closerange(0, 3)"),
    survived("output closed over unwritten text", "sys.stdout.write('x'); os.closerange(1, 2)", free=True, environment=BUFFERED),
    survived("a clean-up that ends the process, workers replaced", load="atexit.register(os._exit, 5)", free=True),
    survived("a thread that never ends, workers replaced", load="threading.Thread(target=time.sleep, args=(1000,)).start()", free=True),
    survived("no home", environment=(("HOME", None),)),
    survived("a home that cannot be written to", environment=(("HOME", "/proc/1"), ("XDG_CACHE_HOME", "/proc/1"))),
    survived("no folder for temporary files", environment=(("TMPDIR", "/nowhere"),)),
    survived("another working directory, removed", GONE, free=True),
    survived("clocks that stand still", "time.time = time.monotonic = lambda: 0.0"),
    survived("children's ends ignored", "signal.signal(signal.SIGCHLD, signal.SIG_IGN)", free=True),
    survived("all signals blocked", "signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())", free=True),
]  # fmt: skip
FAILS = [
    fails("an error", "raise KeyError('missing')", "KeyError: 'missing'"),
    fails("endless recursion", "def down(): down()\ndown()", "RecursionError"),
    fails("an error that cannot be shown", "class Odd(Exception):\n    def __str__(self): raise OSError\nraise Odd", "Odd"),
    fails("an error that ends whoever unpickles it", EXITS, "Odd"),
    fails(
        "a full disk",
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "with open('checkpoint', 'wb') as file: file.write(bytes(2**20))",
        "OSError: .*File too large",
    ),
    fails(
        "no shared memory",
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "from multiprocessing.shared_memory import SharedMemory; SharedMemory(create=True, size=4096)",
        "OSError: .*File too large",
    ),
    Fault("an error while loading", load="raise OSError('no data')", code=5, says="(?s)OSError: no data.*autobatch: the workload failed"),
]  # fmt: skip
SHARED = [
    ends("shared memory of torch, then SIGKILL", TORCH_SHARED, "was killed by SIGKILL"),
    ends("shared memory of Python, then SIGKILL", PYTHON_SHARED, "was killed by SIGKILL"),
    ends("a DataLoader at work, then SIGKILL", LOADING, "was killed by SIGKILL"),
]
FAULTS = [*ENDS, *HANGS, *SURVIVED, *FAILS, *SHARED]
