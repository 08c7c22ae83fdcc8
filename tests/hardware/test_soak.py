"""The full system for a moment: whether any of its processes gathers threads, sockets, files or shared memory."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks/ is no package of the distribution

from benchmarks import soak
from hardware.ros.shared_memory import stale_files

PACE = 0.15
"""Of the operator: a takeover and an emergency stop every four and a half seconds."""
SECONDS, PERIOD = 7.0, 0.3
GATHERED = ("thread_growth", "socket_growth", "file_growth", "shared_growth")


@pytest.mark.ros
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("ros_domain")
def test_no_process_of_the_full_system_holds_more_in_the_end_than_once_everything_had_been_used(tmp_path):
    pytest.importorskip("rclpy", reason="ROS 2 is not installed: pip install 'robot-rl[ros]'")
    log = tmp_path / "log"

    def count(mode):
        return log.read_text().count(f"-> {mode}")

    with soak.launched(soak.prepare(tmp_path, 240.0, PACE), log, f"--logs={tmp_path}") as process:
        deadline = time.monotonic() + 180
        while not (count("human") and count("stopped")):  # on a busy machine the policy misses the first keys
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        stops = count("stopped")
        names, looks, lost = soak.watch(process, SECONDS, PERIOD)
        assert count("stopped") > stops, "it was used meanwhile"
    assert process.returncode == 0
    assert not lost
    assert {"executor", "policy", "teleop", "console", "recorder", "camera"} <= set(names.values())
    found = {names[number]: one.figures() for number, one in looks.items()}
    gathered = {name: {key: one[key] for key in GATHERED if one[key] > 0} for name, one in found.items()}
    assert not any(gathered.values()), gathered
    memory = {names[number]: one.memory[-1] - one.memory[0] for number, one in looks.items()}
    assert max(memory.values()) < 50.0, memory
    mapped = set().union(*(one.mapped for one in looks.values()))
    assert [path for path in stale_files() if str(path) in mapped] == []


def test_what_a_process_gathers_is_seen():
    code = """
import mmap, socket, sys, tempfile, threading
kept = []
for line in sys.stdin:
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    shared = tempfile.TemporaryFile(dir="/dev/shm")
    shared.truncate(4096)
    kept += [socket.socket(), shared, mmap.mmap(shared.fileno(), 4096), bytearray(4_000_000)]
    print(flush=True)
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    looks = soak.Looks()
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        for second in range(12):
            process.stdin.write("\n")
            process.stdout.readline()
            assert looks.look(process.pid, float(second))
        process.stdin.close()
        process.wait(30)
    figures = looks.figures()
    assert all(figures[key] == 4 for key in ("thread_growth", "socket_growth", "shared_growth"))
    assert figures["file_growth"] >= 4
    assert figures["memory_growth_mib_per_minute"] == pytest.approx(60 * 4_000_000 / 2**20, rel=0.2)
    assert not soak.Looks().look(process.pid, 0.0)
