"""Child processes: stopped in order, never left behind, and able to say why they failed."""

import os
import signal
import subprocess
import sys
import time

import pytest

from robot_rl.core.errors import MissingDependencyError
from robot_rl.rl.compare.jobs import failure_line, spawn, stop_processes
from robot_rl.rl.remote import connect_ray

WAIT = "import time\ntry:\n    print('ready', flush=True)\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    "


def ready(log):
    deadline = time.monotonic() + 60
    while not (log.exists() and "ready" in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_interrupted_process_ends_in_order(tmp_path):
    log = tmp_path / "log"
    process = spawn(("-c", WAIT + "print('saved')"), log, 1)
    ready(log)
    stop_processes([process])
    assert process.returncode == 0
    assert log.read_text().split() == ["ready", "saved"]


def test_a_process_that_does_not_listen_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("robot_rl.rl.compare.jobs.GRACE_SECONDS", 0.2)
    log = tmp_path / "log"
    process = spawn(("-c", WAIT + "time.sleep(60)"), log, 1)
    ready(log)
    stop_processes([process])
    assert process.returncode == -signal.SIGKILL


def test_a_child_does_not_outlive_us(tmp_path):
    child = tmp_path / "child"
    code = (
        "import pathlib, time\nfrom robot_rl.rl.compare.jobs import spawn\n"
        "wait = 'import time; print(\"ready\", flush=True); time.sleep(60)'\n"
        f"p = spawn(('-c', wait), pathlib.Path({str(child)!r}), 1)\n"
        "print(p.pid, flush=True)\ntime.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    ready(child)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while alive(pid):
        assert time.monotonic() < deadline, "the child goes on without us"
        time.sleep(0.05)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_last_line_says_why_it_failed(tmp_path):
    log = tmp_path / "log"
    log.write_text("Traceback\n  more\nValueError: so it is\n\n")
    assert failure_line(1, log) == "ValueError: so it is"
    assert failure_line(0, log) == ""
    assert failure_line(-signal.SIGKILL, log) == "ended by SIGKILL, perhaps for want of memory"
    assert failure_line(3, tmp_path / "none") == "exit status 3 without a word"


def test_without_ray_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"compare --cluster needs the package 'ray'.*robot-rl\[cluster\]"):
        connect_ray("compare --cluster")


def test_processors_and_threads_are_limited(tmp_path):
    log = tmp_path / "log"
    core = min(os.sched_getaffinity(0))
    text = "import os; print(sorted(os.sched_getaffinity(0)), os.environ['OMP_NUM_THREADS'])"
    assert spawn(("-c", text), log, 3, {core}).wait() == 0
    assert log.read_text() == f"[{core}] 3\n"
