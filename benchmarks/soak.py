"""What half an hour does to the full system: whether any of its processes gathers memory, threads, sockets or files.

`robot-rl launch` starts what a user would: a simulated robot with its executor and a recording of everything executed,
a policy, an operator who presses keys (the policy is enabled, taken over from, stopped and enabled again, over and
over), a camera, a recorder of the topics and the browser console. Every few seconds each process is looked at in /proc.
The slope is that of the last two thirds of the run, for what a process needs it has allocated by then.

Run: ``make bench NAME=soak`` or ``python benchmarks/soak.py [--minutes 30]``.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml

from benchmarks.common import report
from robot_rl.core.errors import RobotRLError

TASK = "peg_insert"
PERIOD, SETTLE = 5.0, 30.0
"""Seconds between two looks, and before the first of them."""
ROUND = "2 n, 10 w 1.0, 11.5 a 0.5, 13 b, 25 space, 27 r, 28 n"
"""Keys of half a minute: enable, drive, hand back, stop, reset, enable."""
ROUND_SECONDS = 30.0
IMAGE, FRAMES = (480, 640, 3), 30
TARGETS = {
    "worst_memory_growth_mib_per_minute": ["<=", 0.5],
    "worst_thread_growth": ["<=", 0],
    "worst_socket_growth": ["<=", 0],
    "worst_file_growth": ["<=", 0],
    "shared_memory_files_left": ["<=", 0],
    "processes_lost": ["<=", 0],
}


@dataclass
class Looks:
    """What one process held at each look."""

    times: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    """Resident, in MiB."""
    threads: list[int] = field(default_factory=list)
    sockets: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    """Open files and pipes."""
    shared: list[int] = field(default_factory=list)
    """Files in shared memory that are mapped."""
    mapped: set[str] = field(default_factory=set)
    """All of them, by name."""

    def look(self, number: int, now: float) -> bool:
        """Look at a process; returns whether it still runs."""
        process = Path("/proc") / str(number)
        try:
            opened = [_target(link) for link in (process / "fd").iterdir()]
            pages = int((process / "statm").read_text().split()[1])
            threads = len(list((process / "task").iterdir()))
            lines = (process / "maps").read_text().splitlines()
        except OSError:
            return False
        sockets = sum(name.startswith("socket:") for name in opened)
        self.times.append(now)
        self.memory.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
        self.threads.append(threads)
        self.sockets.append(sockets)
        self.files.append(len(opened) - sockets)
        mapped = {line.split(maxsplit=5)[5] for line in lines if "/dev/shm/" in line}
        self.mapped |= mapped
        self.shared.append(len(mapped))
        return True

    def figures(self) -> dict[str, float]:
        """Return the slope of the memory over the last two thirds, and how much more of the rest there is at the end.

        A recorder opens a file now and then, so that counts are compared by their smallest values in the second and in
        the last third of the run.
        """
        third = len(self.times) // 3
        times, memory = np.array(self.times[third:]) / 60, np.array(self.memory[third:])
        found = {"memory_growth_mib_per_minute": float(np.polyfit(times - times[0], memory, 1)[0])}
        for name in ("threads", "sockets", "files", "shared"):
            counts = getattr(self, name)
            found[f"{name.removesuffix('s')}_growth"] = min(counts[2 * third :]) - min(counts[third : 2 * third])
        return found | {"memory_mib": self.memory[-1], "threads": self.threads[-1]}


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""  # closed meanwhile


def descendants(parent: int) -> dict[int, str]:
    """Return the processes below ``parent`` with the names of their nodes."""
    parents, names = {}, {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            number = int(process.name)
            parents[number] = int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        node = [word.removeprefix("__node:=") for word in words if word.startswith("__node:=")]
        names[number] = node[0] if node else Path(words[0]).name
    below = {parent}
    while more := {number for number, one in parents.items() if one in below} - below:
        below |= more
    return {number: names[number] for number in sorted(below)}


def prepare(folder: Path, seconds: float, pace: float = 1.0) -> Path:
    """Write a policy, a film for the camera, the operator's keys for ``seconds`` and a launch file; returns the last.

    Half a minute of keys takes ``pace`` half minutes.
    """
    import cv2
    import torch

    from robot_rl.core.registry import make_env
    from robot_rl.policies.checkpoint import save_policy
    from robot_rl.policies.chunked import ChunkedConfig, ChunkedPolicy

    torch.manual_seed(0)
    env = make_env(TASK, num_envs=1)
    save_policy(ChunkedPolicy(env.spec, ChunkedConfig(width=256, depth=2)), folder / "policy")
    env.close()
    film = cv2.VideoWriter(str(folder / "film.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 30.0, IMAGE[1::-1])
    random = np.random.default_rng(0)
    for _ in range(FRAMES):
        film.write(cv2.resize(random.integers(0, 255, (48, 64, 3), np.uint8), IMAGE[1::-1]))
    film.release()
    keys = [press.split() for press in ROUND.split(",")]
    rounds = range(int(seconds / (pace * ROUND_SECONDS)) + 4)
    lines = [
        " ".join([f"{pace * (ROUND_SECONDS * k + float(when)):g}", key, *(f"{pace * float(one):g}" for one in hold)])
        for k in rounds
        for when, key, *hold in keys
    ]
    (folder / "keys.txt").write_text("\n".join(lines) + "\n")

    arguments = {
        "policy": folder / "policy",
        "task": TASK,
        "teleop": "script",
        "teleop_options": f"['script={folder / 'keys.txt'}', 'autostart=true']",
        "console": "true",
        "port": 8970,
        "bag": folder / "bag",
        "record": folder / "record",
    }
    hil = Path(__file__).resolve().parents[1] / "launch" / "hil.launch.yaml"
    given = [{"name": name, "value": str(value)} for name, value in arguments.items()]
    common = {"pkg": "robot_rl", "namespace": "robot_rl"}
    camera = [{"name": "camera_options", "value": [f"source={folder / 'film.avi'}"]}]
    actions = [
        {"include": {"file": str(hil), "arg": given}},
        {"node": {**common, "exec": "camera_node", "name": "camera", "param": camera}},
    ]
    path = folder / "soak.launch.yaml"
    path.write_text(yaml.safe_dump({"launch": actions}, sort_keys=False))
    return path


@contextmanager
def launched(path: Path, log: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Launch what the file at ``path`` says, and end it as Ctrl-C does."""
    command = [str(Path(sys.executable).with_name("robot-rl")), "launch", *options, str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    try:
        yield process
    except BaseException:
        print(log.read_text()[-3000:], file=sys.stderr)
        raise
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60.0)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def watch(
    process: subprocess.Popen[bytes], seconds: float, period: float
) -> tuple[dict[int, str], dict[int, Looks], list[str]]:
    """Look at the processes until the time is over; returns their names, the looks, and who ended before."""
    names, begun, lost = descendants(process.pid), time.monotonic(), []
    looks = {number: Looks() for number in names}
    while (now := time.monotonic() - begun) < seconds:
        ended = [number for number, one in looks.items() if not one.look(number, now)]
        lost += [names[number] for number in ended]
        looks = {number: one for number, one in looks.items() if number not in ended}
        total = sum(one.memory[-1] for one in looks.values())
        shown = f"{now / 60:5.1f}/{seconds / 60:g} min: {len(looks)} processes, {total:.0f} MiB"
        print(f"\r{shown}", end="" if sys.stdout.isatty() else "\n", flush=True)
        if process.poll() is not None:
            raise RobotRLError(f"the system ended by itself with exit code {process.returncode}")
        time.sleep(period)
    return names, looks, lost


def main() -> None:
    """Start the system, watch it, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="how long to watch")
    options = parser.parse_args()
    from hardware.ros.context import free_domain, prepare_environment
    from hardware.ros.shared_memory import stale_files

    prepare_environment(free_domain())
    stale = len(stale_files())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds = 60 * options.minutes
        with launched(prepare(folder, seconds), folder / "log") as process:
            time.sleep(SETTLE)
            names, looks, lost = watch(process, seconds, PERIOD)
        written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
        text = (folder / "log").read_text()
    found = {f"{names[number]} ({k})": one.figures() for k, (number, one) in enumerate(looks.items())}
    worst = {
        f"worst_{key}": max(one[key] for one in found.values())
        for key in ("memory_growth_mib_per_minute", "thread_growth", "socket_growth", "file_growth")
    }
    report(
        "soak",
        seeds=[0],
        budget={"minutes": options.minutes, "processes": len(found)},
        metrics={
            **worst,
            "shared_memory_files_left": len(stale_files()) - stale,
            "processes_lost": len(lost),
            "exit_code": process.returncode,
            "written_mib": written,
            "takeovers": text.count("-> human"),
            "emergency_stops": text.count("-> stopped"),
        },
        peers=found,
        targets=TARGETS,
        notes="Slope of the resident memory over the last two thirds of the run, in the worst process. "
        f"Ended before their time: {', '.join(lost) or 'none'}.",
    )


if __name__ == "__main__":
    main()
