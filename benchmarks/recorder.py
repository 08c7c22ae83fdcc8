"""Whether the recorder loses messages, and what a kill costs: joint states at 500 Hz and three cameras at 30 Hz.

Five processes over ROS 2 on this machine: one publishes ``sensor_msgs/JointState`` of seven joints, three publish
640x480 ``sensor_msgs/Image`` each, and `hardware.ros.recorder_node` records all of it. The recorder is then killed
(SIGKILL) while the others go on, and its unfinished file is rescued as ``robot-rl record recover`` does. Every
publisher numbers its messages, so that each lost one is known.

Run: ``make bench NAME=recorder`` or ``python benchmarks/recorder.py [--seconds 300] [--profile images|loopback]``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

STATE_RATE, CAMERA_RATE, CAMERAS, HEIGHT, WIDTH, JOINTS = 500.0, 30.0, 3, 480, 640, 7
STATE = "/joint_states"
PROFILES = {"images": "fastdds_images.xml", "loopback": "fastdds.xml"}
TARGETS = {"lost": ["<=", 0], "unreadable_after_kill_s": ["<=", 0.5]}
EXPLANATION = (
    "lost: messages published between the first and the last that were recorded, and not recorded. "
    "unreadable_after_kill_s: from the last message in the rescued file to the kill, the most of all topics and kills, "
    "which includes the time since that topic's last message (33 ms for a camera). Images: a moving scene with sensor "
    "noise. busy_cores: load by all programs of the machine while it recorded. publishers_missed_ticks: messages that "
    "publishers skipped because they were late themselves."
)


def camera(number: int) -> str:
    """Return the topic of a camera."""
    return f"/camera_{number}/image_raw"


# ---- the processes ---------------------------------------------------------------------------------------------------


def publish_states(output: Path, stop: threading.Event) -> None:
    """Publish joint states until ``stop``; write when each was sent."""
    from sensor_msgs.msg import JointState

    names = [f"joint_{i}" for i in range(JOINTS)]

    def message(count: int) -> Any:
        values = np.sin(0.01 * count + np.arange(JOINTS)).tolist()
        return JointState(name=names, position=values, velocity=values, effort=values)

    publish(JointState, STATE, STATE_RATE, message, 100, output, stop)


def publish_images(number: int, output: Path, stop: threading.Event, reliable: bool) -> None:
    """Publish images of one camera until ``stop``; write when each was sent."""
    from sensor_msgs.msg import Image

    frames = scene(number)

    def message(count: int) -> Any:
        data = frames[count % len(frames)]
        return Image(height=HEIGHT, width=WIDTH, encoding="rgb8", step=3 * WIDTH, data=data)

    publish(Image, camera(number), CAMERA_RATE, message, 5, output, stop, reliable)


def scene(seed: int, frames: int = 10) -> list[bytes]:
    """Return images of moving bright spots with noise, as bytes: setting ``data`` to an array is 100 times slower."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    found = []
    for k in range(frames):
        colours = [128 + 90 * np.sin((x + 12 * k) / 60 + c) * np.cos((y - 9 * k) / 50 + c) for c in range(3)]
        picture = np.stack(colours, -1) + rng.normal(0, 2, (HEIGHT, WIDTH, 3))
        found.append(picture.clip(0, 255).astype(np.uint8).tobytes())
    return found


def publish(
    kind: type,
    topic: str,
    rate: float,
    message: Callable[[int], Any],
    depth: int,
    output: Path,
    stop: threading.Event,
    reliable: bool = True,
) -> None:
    """Publish ``message(count)`` at ``rate`` (Hz) until ``stop``; write the times of all (ns since 1970)."""
    from hardware.ros.endpoint import Endpoint, quality
    from robot_rl.core.clock import Rate

    endpoint = Endpoint(f"publisher_{os.getpid()}")
    send = endpoint.publisher(kind, topic, quality(depth, reliable=reliable))
    endpoint.start()
    times = []
    clock = Rate(rate)
    try:
        while not stop.is_set():
            clock.wait()
            content = message(len(times))
            now = time.time_ns()
            content.header.stamp.sec, content.header.stamp.nanosec = divmod(now, 1_000_000_000)
            send(content)
            times.append(now)
    finally:
        output.write_text(json.dumps({"times": times, "missed": clock.missed}))
        endpoint.close()


# ---- evaluation ------------------------------------------------------------------------------------------------------


def recorded_stamps(directory: Path) -> dict[str, list[int]]:
    """Return the header stamps (ns) of everything recorded, by topic."""
    from robot_rl.data.bag.bag import open_bag

    bag = open_bag(directory)
    kinds = {name: topic.message_type() for name, topic in bag.topics.items()}
    found: dict[str, list[int]] = {name: [] for name in bag.topics}
    for message in bag.messages():
        stamp = kinds[message.topic].stamp(message.data)
        if stamp is not None:
            found[message.topic].append(stamp)
    return found


def compare(recorded: dict[str, list[int]], published: dict[str, list[int]]) -> dict[str, int]:
    """Return how many messages were recorded, lost, and recorded twice.

    Those before the first and after the last recorded one of a topic were sent while nobody listened.
    """
    total, lost, twice = 0, 0, 0
    for topic, times in published.items():
        stamps = recorded.get(topic, [])
        if not stamps:
            raise SystemExit(f"nothing was recorded of {topic}")
        known, first, last = set(stamps), min(stamps), max(stamps)
        total += len(stamps)
        twice += len(stamps) - len(known)
        lost += sum(first <= one <= last and one not in known for one in times)
    return {"recorded": total, "lost": lost, "twice": twice}


def processor_seconds() -> float:
    """Return the busy seconds of all cores so far."""
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def used_seconds(pid: int) -> float:
    """Return the processor seconds of a running process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_megabytes(pid: int) -> float:
    """Return the largest memory of a running process (MB)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3


def measure(seconds: float, kill: bool, directory: Path, reliable: bool, arguments: list[str]) -> dict[str, Any]:
    """Run publishers and the recorder for ``seconds``, end the recorder, and return what it recorded.

    Args:
        seconds: how long to record once every topic has been found.
        kill: whether the recorder is killed rather than asked to end.
        directory: of everything that is written.
        reliable: whether images are published reliably.
        arguments: further ones of the recorder.
    """
    from hardware.ros.processes import Supervisor
    from robot_rl.data.bag.recover import recover

    topics = [STATE, *(camera(i) for i in range(CAMERAS))]
    script, bag = str(Path(__file__).resolve()), directory / "bag"
    outputs = {topic: directory / f"{number}.json" for number, topic in enumerate(topics)}
    with Supervisor(directory / "logs") as supervisor:
        one_thread = {"OMP_NUM_THREADS": "1"}
        for number, topic in enumerate(topics):
            command = [sys.executable, script, "--role", str(number), "--output", str(outputs[topic])]
            command += [] if reliable else ["--best-effort"]
            supervisor.start(f"publisher_{number}", command, one_thread)
        wanted = [word for topic in topics for word in ("--topics", topic)]
        command = [sys.executable, "-m", "hardware.ros.recorder_node", "--out", str(bag), *wanted, *arguments]
        recorder = supervisor.start("recorder", [*command, "--report", str(directory / "report.json")], one_thread)
        wait_for_recording(recorder, directory, len(topics))
        begun, busy, used = time.monotonic(), processor_seconds(), used_seconds(recorder.process.pid)
        time.sleep(seconds)
        used = (used_seconds(recorder.process.pid) - used) / (time.monotonic() - begun)
        busy = (processor_seconds() - busy) / (time.monotonic() - begun)
        memory = peak_megabytes(recorder.process.pid)
        recorder.process.send_signal(signal.SIGKILL if kill else signal.SIGINT)
        ended = time.time_ns()
        recorder.process.wait(120.0)
        if not kill and recorder.process.returncode:
            raise SystemExit(recorder.describe_end())
        time.sleep(0.5)
    published = {topic: json.loads(path.read_text()) for topic, path in outputs.items()}
    found: dict[str, Any] = {"recorder_cores": used, "recorder_memory_mb": memory, "busy_cores": busy}
    if kill:
        begun = time.monotonic()
        recover(bag)
        found["rescue_s"] = time.monotonic() - begun
    stamps = recorded_stamps(bag)
    found |= compare(stamps, {topic: one["times"] for topic, one in published.items()})
    found["publishers_missed_ticks"] = sum(one["missed"] for one in published.values())
    found["megabytes"] = sum(file.stat().st_size for file in bag.iterdir() if file.suffix == ".mcap") / 1e6
    # The last message before the kill is up to one period of its topic older than the kill.
    found["unreadable_s"] = max((ended - max(times)) * 1e-9 for times in stamps.values())
    return found


def wait_for_recording(recorder: Any, directory: Path, topics: int, patience: float = 60.0) -> None:
    """Wait until the recorder has found all topics."""
    deadline = time.monotonic() + patience
    log = directory / "logs" / "recorder.log"
    while log.read_text().count(": recording /") < topics:
        if recorder.process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(recorder.describe_end())
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=300.0, help="length of the recording that is ended in order")
    parser.add_argument("--kill-seconds", type=float, default=20.0, help="length of each recording that is killed")
    parser.add_argument("--kills", type=int, default=3, help="recordings that are killed")
    parser.add_argument("--profile", choices=PROFILES, default="images", help="Fast DDS settings of all processes")
    parser.add_argument("--directory", type=Path, help="where to record (85 MB/s); a temporary directory by default")
    parser.add_argument("--compression", choices=("zstd", "none"), default="zstd")
    parser.add_argument("--best-effort", action="store_true", help="publish images as camera drivers often do")
    parser.add_argument("--role", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role is not None:
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        if arguments.role:
            publish_images(arguments.role - 1, arguments.output, stop, not arguments.best_effort)
        else:
            publish_states(arguments.output, stop)
        return
    benchmark(arguments)


def benchmark(arguments: argparse.Namespace) -> None:
    """Record once to the end and several times to a kill, and report."""
    from benchmarks.common import report
    from hardware.ros.context import free_domain, prepare_environment
    from robot_rl.core.paths import data_file

    profile = str(data_file("launch", PROFILES[arguments.profile]))
    os.environ.update(dict.fromkeys(("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE"), profile))
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "SYSTEM_DEFAULT"
    prepare_environment(free_domain())
    options = ["--compression", arguments.compression]
    runs = []
    for number in range(arguments.kills + 1):
        kill = number > 0
        seconds = arguments.kill_seconds if kill else arguments.seconds
        root = Path(tempfile.mkdtemp(dir=arguments.directory))
        try:
            runs.append(measure(seconds, kill, root, not arguments.best_effort, options))
        finally:
            shutil.rmtree(root)
        print("killed" if kill else "whole", json.dumps(runs[-1]), flush=True)
    whole, killed = runs[0], runs[1:]
    report(
        "recorder",
        seeds=[0],
        budget={
            "seconds": arguments.seconds,
            "kills": arguments.kills,
            "kill_seconds": arguments.kill_seconds,
            "profile": arguments.profile,
            "reliable_images": not arguments.best_effort,
            "compression": arguments.compression,
        },
        metrics={
            **{name: value for name, value in whole.items() if name != "unreadable_s"},
            "unreadable_after_kill_s": max((one["unreadable_s"] for one in killed), default=float("nan")),
            "lost_before_kill": sum(one["lost"] for one in killed),
            "rescue_s": max((one["rescue_s"] for one in killed), default=float("nan")),
        },
        targets=TARGETS,
        notes=EXPLANATION,
    )


if __name__ == "__main__":
    main()
