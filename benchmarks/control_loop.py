"""How punctual the executor is beside policy inference, and how long an observation takes to become a command.

Two processes over ROS 2 on this machine: the executor of `hardware.control.executor` at 100 Hz with its default
settings and the safety chain on, and a policy of 4 M parameters that plans at each of its 20 steps per second on one
thread (traced, see `hardware.policy_process.trace_network`). In turn with it, so that whatever else runs on the machine
disturbs all alike: the same without the real-time priority that the default asks for, and the same tick called by an
rclpy timer in the thread that also serves the subscriptions, which is how a ROS 2 node is usually written. Three more
run beside three cameras, whose images arrive in the executor's process: at 100 and at 500 Hz, with the real-time
priority that the executor asks for by default, and at 100 Hz without; there the policy is an ONNX file.

Run: ``make bench NAME=control_loop`` or ``python benchmarks/control_loop.py [--seconds 60] [--rounds 3] [--extras]``.
Ten minutes beside cameras, for what memory does, are ``control_loop_long``.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

TICK_RATE, POLICY_RATE, JOINTS, SAMPLE_STEPS = 100.0, 20.0, 7, 10
CAMERAS, CAMERA_RATE, IMAGE = 3, 30.0, (480, 640, 3)
LONG, KEPT = 120.0, 20.0
"""Seconds beyond which a run keeps what it measured of the last seconds only, so that its own notes do not grow."""
TARGETS = {
    "lateness_p99_ms": ["<=", 1.0],
    "missed_ticks": ["<=", 0],
    "latency_minus_inference_p99_ms": ["<=", 5.0],
}
BESIDE_CAMERAS = {
    "lateness_p99_ms": ["<=", 1.0],
    "policy_starved_ticks": ["<=", 0],
    "memory_growth_mib_per_minute": ["<=", 0.5],
}
"""Targets of the kinds ``cameras`` and, but for the lateness, ``fast_cameras``."""
EXPLANATION = (
    "Lateness: wake-up of a tick against its absolute deadline. Latency: measurement of an observation to the first "
    "command that its chunk brought about, over ROS 2 both ways; that command may replace the one of the present tick "
    "(share_within_tick of all). The figures with targets are without real-time priority. Peers ran in turn with it: "
    "realtime asks for that priority, as the executor does by default (realtime_priority says whether it was granted); "
    "rclpy_timer, at normal priority, calls the same tick from a timer. Extras, on request: on_ticks replaces no "
    "command, so that a chunk waits for the next tick; pinned keeps loop and policy to a processor each, which is for "
    "machines with nothing else to do. cameras and fast_cameras (500 Hz), with the priority that is asked for by "
    "default, and cameras_normal: three cameras' worth of 640x480 images at 30 Hz arrive beside it, with the Fast DDS "
    "profile for images. sleeping_thread: a thread of the loop's priority that does nothing but wake up every 10 ms, "
    "measured last, alone: what is late there is the machine's own. Load by other programs: what was taken from the "
    "machine counts too. Memory: slope of the "
    "executor's resident set over the last two thirds of the run; what a short run shows is mostly start-up."
)
KINDS: dict[str, dict[str, Any]] = {
    "normal": {"realtime_priority": 0},
    "realtime": {},
    "rclpy_timer": {"realtime_priority": 0},
    "on_ticks": {"realtime_priority": 0, "replace_within_tick": False},
    "pinned": {"realtime_priority": 0, "pin": True},
    "cameras": {},
    "fast_cameras": {"tick_rate_hz": 500.0},
    "cameras_normal": {"realtime_priority": 0},
}
"""Settings of the executor by kind of run."""
EXPORTED = "exported"
"""Directory of the ONNX file beside what the processes write."""
EXTRAS = ("on_ticks", "pinned")
"""Kinds that run on request."""


# ---- the processes ---------------------------------------------------------------------------------------------------


class Notes(dict[int, Any]):
    """What was noted by number; of a long run, the newest only."""

    def __init__(self, seconds: float, rate: float) -> None:
        super().__init__()
        self.most = int(KEPT * rate) if seconds > LONG else 0

    def __setitem__(self, number: int, value: Any) -> None:
        super().__setitem__(number, value)
        while self.most and len(self) > self.most:
            del self[next(iter(self))]


def row(seconds: float, rate: float) -> deque[float]:
    """Return an empty row of moments, which keeps the newest only in a long run."""
    return deque(maxlen=int(KEPT * rate) if seconds > LONG else None)


def resident_mib() -> float:
    """Return this process's memory in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def random_policy() -> Any:
    """Return the policy that is served, without training."""
    import torch

    from hardware.robots.fake import FakeRobot
    from robot_rl.policies.chunked import ChunkedConfig, ChunkedPolicy

    torch.manual_seed(0)
    spec = FakeRobot(JOINTS, rate_hz=POLICY_RATE).spec
    return ChunkedPolicy(spec, ChunkedConfig(width=512, depth=3, execute_steps=1, sample_steps=SAMPLE_STEPS)).eval()


def policy_role(output: Path, stop: threading.Event, seconds: float, kind: str) -> None:
    """Serve a random policy of realistic size; write when each observation was read and its chunk sent."""
    import torch

    from hardware.policy_process import serve, trace_network
    from hardware.ros.link import RosPolicyLink
    from robot_rl.core.policy import ActionChunk
    from robot_rl.core.robot import StampedObservation
    from robot_rl.policies.checkpoint import load_policy

    torch.set_num_threads(1)
    policy: Any = random_policy()
    parameters = sum(one.numel() for one in policy.parameters())  # what runs keeps none by that name
    if "cameras" in kind:
        policy = load_policy(output.parent / EXPORTED)
    else:
        trace_network(policy)
    times: Notes = Notes(seconds, POLICY_RATE)

    class TimedLink(RosPolicyLink):
        def receive_observation(self, timeout: float) -> StampedObservation | None:
            found = super().receive_observation(timeout)
            if found is not None:
                times[found.seq] = [time.monotonic()]
            return found

        def send_chunk(self, chunk: ActionChunk) -> None:
            times[chunk.observation_seq].append(time.monotonic())
            super().send_chunk(chunk)

    link = TimedLink()
    try:
        serve(policy, link, stop, pin=kind == "pinned")
    finally:
        link.close()
    output.write_text(json.dumps({"parameters": parameters, "times": times}))


def executor_role(output: Path, stop: threading.Event, seconds: float, kind: str) -> None:
    """Run the executor for ``seconds``; write when it observed, got chunks and sent commands.

    ``kind`` is one of `KINDS`: ``rclpy_timer`` calls the tick from such a timer, the others run the executor's loop.
    """
    from hardware.control.executor import Executor, ExecutorConfig
    from hardware.control.realtime import MessengerThread, release_realtime, request_realtime
    from hardware.control.statistics import Durations
    from hardware.robots.fake import FakeRobot
    from hardware.ros import convert
    from hardware.ros.link import RosExecutorLink
    from robot_rl.core.policy import ActionChunk
    from robot_rl.core.robot import StampedObservation

    rate = KINDS[kind].get("tick_rate_hz", TICK_RATE)
    observed, commanded = row(seconds, rate), row(seconds, rate)
    stamps, arrived, polled = (Notes(seconds, POLICY_RATE) for _ in range(3))
    memory: list[tuple[float, float, int]] = []

    class TimedRobot(FakeRobot):
        def observe(self) -> StampedObservation:
            observed.append(time.monotonic())
            return super().observe()

        def command(self, action: np.ndarray) -> np.ndarray:
            sent = super().command(action)
            commanded.append(time.monotonic())
            self.commands.clear()
            self.commanded_after.clear()
            return sent

    class TimedLink(RosExecutorLink):
        def send_observation(self, observation: StampedObservation) -> None:
            stamps[observation.seq] = observation.stamp
            super().send_observation(observation)

        def poll_chunk(self) -> ActionChunk | None:
            chunk = super().poll_chunk()
            if chunk is not None:
                polled[chunk.observation_seq] = time.monotonic()
            return chunk

        def _on_chunk(self, message: Any) -> None:
            arrived[convert.from_header(message.header)[1]] = time.monotonic()
            super()._on_chunk(message)

    class ExactDurations(Durations):
        values: ClassVar[deque[float]] = row(seconds, rate)

        def add(self, seconds: float) -> None:
            super().add(seconds)
            self.values.append(seconds)

    lateness = ExactDurations()
    robot = TimedRobot(JOINTS, rate_hz=POLICY_RATE)
    link = TimedLink(robot.spec)
    options = {"tick_rate_hz": TICK_RATE, **KINDS[kind]}
    config = ExecutorConfig(execute_steps=1, late_steps=3, autostart=True, **options)
    granted = request_realtime(config.realtime_priority)
    if granted:
        release_realtime()  # the loop asks for itself
    executor = Executor(robot, link, config)
    executor.lateness = lateness
    if "cameras" in kind:
        watch_cameras(link)
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(1.0):
            memory.append((time.monotonic(), resident_mib(), IMAGES_SEEN[0]))

    MessengerThread(target=sample, daemon=True).start()  # what it does is no part of what is measured
    executor.connect()
    try:
        if kind == "rclpy_timer":
            timer_loop(executor, link, stop, seconds)
        else:
            executor.run(stop, seconds)
    finally:
        ended.set()
        executor.shut_down()
        link.close()
    late = list(lateness.values)
    times: dict[str, Any] = {"observed": list(observed), "commanded": list(commanded)}
    times |= {"lateness": late if seconds > LONG else late[int(rate / 2) :]}
    times |= {"stamps": stamps, "arrived": arrived, "polled": polled, "memory": memory}
    output.write_text(json.dumps({"report": executor.report(), "times": times, "granted": granted}))


def timer_loop(executor: Any, link: Any, stop: threading.Event, seconds: float) -> None:
    """Call the executor's tick from an rclpy timer in the thread that serves the subscriptions."""
    from rclpy.clock import Clock, ClockType

    # The default clock is the system's time, which drifts against the monotonic one that lateness is measured with.
    steady = Clock(clock_type=ClockType.STEADY_TIME)
    timer = link.endpoint.node.create_timer(1.0 / TICK_RATE, executor.tick, clock=steady)
    if executor.ready.wait(120.0):
        stop.wait(seconds)
    timer.cancel()
    time.sleep(5.0 / TICK_RATE)


IMAGES_SEEN = [0]
"""Images that arrived in this process."""


def watch_cameras(link: Any) -> None:
    """Take in the images of `cameras_role`, in the thread that also takes in chunks, as a robot's cameras would."""
    from rclpy.qos import QoSProfile, ReliabilityPolicy
    from sensor_msgs.msg import Image

    profile = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
    newest: dict[int, np.ndarray] = {}

    def take(camera: int, message: Any) -> None:
        newest[camera] = np.frombuffer(message.data, np.uint8).reshape(IMAGE)
        IMAGES_SEEN[0] += 1

    for camera in range(CAMERAS):
        link.endpoint.subscribe(Image, f"camera_{camera}", partial(take, camera), profile)


def cameras_role(stop: threading.Event) -> None:
    """Publish noise as the images of all cameras."""
    from rclpy.qos import QoSProfile, ReliabilityPolicy

    from hardware.ros import convert
    from hardware.ros.endpoint import Endpoint
    from robot_rl.core.clock import Rate

    endpoint = Endpoint("cameras")
    from sensor_msgs.msg import Image

    profile = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
    publish = [endpoint.publisher(Image, f"camera_{k}", profile) for k in range(CAMERAS)]
    endpoint.start()
    image, seq = np.random.default_rng(0).integers(0, 255, IMAGE).astype(np.uint8), 0
    rate = Rate(CAMERA_RATE * CAMERAS)
    while not stop.is_set():
        rate.wait()
        seq += 1
        publish[seq % CAMERAS](convert.to_image(image, time.monotonic(), seq, "camera"))
    endpoint.close()


# ---- evaluation ------------------------------------------------------------------------------------------------------


def percentiles(values: Any, name: str) -> dict[str, float]:
    """Return p50, p99 and maximum of durations in seconds, as ``<name>_…_ms``."""
    found = 1e3 * np.percentile(np.asarray(values, float), [50, 99, 100])
    return dict(zip([f"{name}_p50_ms", f"{name}_p99_ms", f"{name}_max_ms"], map(float, found), strict=True))


def punctuality(times: dict[str, Any], rate: float) -> tuple[dict[str, Any], np.ndarray]:
    """Return all lateness (s) and the missed ticks against the grid of absolute deadlines, and every tick's deadline.

    Lateness is as the loop measured it; for a timer, whose schedule is its own, it is taken against the grid.
    The grid is where most ticks are: it begins with the earliest tick up to 0.5 ms before the densest 0.1 ms of all
    remainders by the period. The first half second (imports, first messages) is left out.
    """
    observed = np.asarray(times["observed"])
    observed = observed[observed > observed[0] + 0.5]
    period = 1.0 / rate
    remainders = observed % period
    counts, edges = np.histogram(remainders, bins=100, range=(0.0, period))
    late = (remainders - edges[counts.argmax()] + 5e-4) % period
    phase = (observed - late)[0] + late[late < 7e-4].min()
    number = np.floor((observed - phase) / period + 1e-9)
    deadlines = phase + number * period
    lateness = times.get("lateness") or observed - deadlines
    missed = max(0, int(number[-1] - number[0] + 1 - len(observed)))
    return {"all": list(lateness), "missed_ticks": missed}, deadlines


Parts = dict[str, list[float]]


def latencies(executor: dict[str, Any], policy: dict[str, Any], rate: float) -> Parts:
    """Return, in seconds per chunk, what passed between an observation and the command that its chunk brought about."""
    times, served = executor["times"], policy["times"]
    commanded = np.asarray(times["commanded"])
    _, deadlines = punctuality(times, rate)
    parts: Parts = {"total": [], "inference": [], "transport": [], "wait": []}
    for seq, polled in times["polled"].items():
        if (
            seq not in served
            or len(served[seq]) < 2
            or seq not in times["stamps"]
            or not max(deadlines[0], commanded[0]) < polled < commanded[-1]  # of a long run the newest are known
        ):
            continue
        read, sent = served[seq]
        stamp, arrived = times["stamps"][seq], times["arrived"][seq]
        command = commanded[np.searchsorted(commanded, polled)]
        deadline = deadlines[np.searchsorted(deadlines, polled) - 1]
        parts["total"].append(command - stamp)
        parts["inference"].append(sent - read)
        parts["transport"].append(arrived - stamp - (sent - read))
        parts["wait"].append(max(0.0, deadline - arrived))
    return parts


def latency_figures(parts: Parts) -> dict[str, float]:
    """Return percentiles of what `latencies` found."""
    total, inference, wait = (np.asarray(parts[name]) for name in ("total", "inference", "wait"))
    return {
        **percentiles(total - inference, "latency_minus_inference"),
        **percentiles(total, "observation_to_command"),
        **percentiles(inference, "inference"),
        **percentiles(parts["transport"], "transport_both_ways"),
        **percentiles(wait, "wait_for_tick"),
        "chunks": len(total),
    }


def processor_seconds() -> tuple[float, float]:
    """Return (busy seconds of all cores, busy seconds of this process and its finished children)."""
    ticks = os.sysconf("SC_CLK_TCK")
    fields = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
    own = os.times()
    return (sum(fields) - fields[3] - fields[4]) / ticks, sum(own[:4])


def measure(kind: str, seconds: float, directory: Path) -> tuple[dict[str, Any], dict[str, Any], float]:
    """Run one executor beside a policy process; return both processes' times and the load by others (cores)."""
    from hardware.ros.processes import Supervisor

    outputs = {name: directory / f"{kind}-{name}.json" for name in ("policy", "executor")}
    command = [sys.executable, str(Path(__file__).resolve()), "--seconds", str(seconds), "--kind", kind]
    if "cameras" in kind:
        from robot_rl.policies.export import export_policy

        export_policy(random_policy(), directory / EXPORTED)
    start, (busy, own) = time.monotonic(), processor_seconds()
    with Supervisor(directory / kind) as supervisor:
        one_thread = {"OMP_NUM_THREADS": "1"}
        if "cameras" in kind:
            images = str(Path(__file__).resolve().parents[1] / "launch" / "fastdds_images.xml")
            one_thread |= dict.fromkeys(("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE"), images)
            supervisor.start("cameras", [*command, "--role", "cameras", "--output", "unused"], one_thread)
        supervisor.start("policy", [*command, "--role", "policy", "--output", str(outputs["policy"])], one_thread)
        executor = supervisor.start(
            "executor", [*command, "--role", "executor", "--output", str(outputs["executor"])], one_thread
        )
        executor.process.wait(seconds + 150.0)
        if executor.process.returncode:
            raise SystemExit(executor.describe_end())
        supervisor.stop(((signal.SIGINT, 120.0), (signal.SIGKILL, 5.0)))  # it has yet to write what it measured
    after_busy, after_own = processor_seconds()
    others = max(0.0, (after_busy - busy) - (after_own - own)) / (time.monotonic() - start)
    found = {name: json.loads(path.read_text()) for name, path in outputs.items()}
    return found["executor"], found["policy"], others


def sleeping_thread(rate: float = TICK_RATE, seconds: float = 20.0) -> dict[str, float]:
    """Return how late a thread wakes up that has the loop's priority and does nothing else: what the machine adds."""
    from hardware.control.executor import ExecutorConfig
    from hardware.control.realtime import control_thread

    late = []
    with control_thread(ExecutorConfig().realtime_priority, pin=False):
        deadline = time.monotonic()
        for _ in range(int(rate * seconds)):
            deadline += 1.0 / rate
            time.sleep(max(0.0, deadline - time.monotonic()))
            late.append(time.monotonic() - deadline)
    return percentiles(late, "lateness")


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="length of all runs of one kind together (s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns in which they are made")
    parser.add_argument("--extras", action="store_true", help=f"run {' and '.join(EXTRAS)} as well")
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, help="run these only")
    parser.add_argument("--name", default="control_loop", help="name of the result; one with other kinds is another")
    parser.add_argument("--role", choices=("policy", "executor", "cameras"), help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=KINDS, default="normal", help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    from hardware.control.realtime import prepare_process

    stop = threading.Event()
    if arguments.role:
        if arguments.kind != "rclpy_timer":
            prepare_process()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        if arguments.role == "policy":
            policy_role(arguments.output, stop, arguments.seconds, arguments.kind)
        elif arguments.role == "cameras":
            cameras_role(stop)
        else:
            executor_role(arguments.output, stop, arguments.seconds, arguments.kind)
        return
    kinds = arguments.kinds or [kind for kind in KINDS if arguments.extras or kind not in EXTRAS]
    benchmark(arguments.seconds, arguments.rounds, kinds, arguments.name)


class Runs:
    """What the runs of one kind showed together."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.lateness: list[float] = []
        self.histograms: list[dict[str, Any]] = []
        self.starved, self.seconds = 0, 0.0
        self.growth: list[float] = []
        self.images: list[float] = []
        self.missed = 0
        self.parts: Parts = {}
        self.within, self.chunks, self.parameters, self.granted = 0, 0, 0, False
        self.others: list[float] = []

    def add(self, executor: dict[str, Any], policy: dict[str, Any], others: float) -> None:
        """Add one run."""
        times, rep = executor["times"], executor["report"]
        figures, _ = punctuality(times, self.rate)
        self.histograms.append(rep["lateness"])
        self.starved += rep["safety"].get("policy_starved", 0)
        self.seconds += rep["seconds"]
        self.growth.append(60.0 * slope(times["memory"], 1))
        self.images.append(slope(times["memory"], 2))
        self.lateness += figures.pop("all")
        self.missed += figures["missed_ticks"] if rep["seconds"] <= LONG else rep["missed_ticks"]
        for name, values in latencies(executor, policy, self.rate).items():
            self.parts.setdefault(name, []).extend(values)
        chunks = executor["report"]["chunks"]
        self.within += chunks.get("chunks_acted_within_tick", 0)
        self.chunks += chunks.get("chunks_accepted", 0)
        self.parameters, self.granted = policy["parameters"], executor["granted"]
        self.others.append(others)

    def figures(self) -> dict[str, float]:
        """Return the figures."""
        late = percentiles(self.lateness, "lateness")
        if self.seconds > LONG:  # only the newest are known one by one; the executor has all of them in bins of 6 %
            late |= {f"lateness_{q}_ms": max(one[f"{q}_ms"] for one in self.histograms) for q in ("p50", "p99", "max")}
        return {
            **late,
            "missed_ticks": self.missed,
            "policy_starved_ticks": self.starved,
            "memory_growth_mib_per_minute": max(self.growth),
            "images_per_second": float(np.mean(self.images)),
            **latency_figures(self.parts),
            "share_within_tick": self.within / max(1, self.chunks),
            "realtime_priority": self.granted,
            "load_by_other_programs_cores": float(np.mean(self.others)),
        }


def slope(samples: list[list[float]], column: int) -> float:
    """Return how much a ``column`` of ``samples`` (the first is time) grows per second in their last two thirds."""
    kept = np.array(samples[len(samples) // 3 :])
    return float(np.polyfit(kept[:, 0] - kept[0, 0], kept[:, column], 1)[0]) if len(kept) > 2 else 0.0


def benchmark(seconds: float, rounds: int, kinds: list[str], name: str) -> None:
    """Run ``kinds`` in turn, each ``rounds`` times and ``seconds`` in all, and report."""
    from benchmarks.common import report
    from hardware.ros.context import free_domain, prepare_environment

    prepare_environment(free_domain())
    runs = {kind: Runs(KINDS[kind].get("tick_rate_hz", TICK_RATE)) for kind in kinds}
    for turn in range(rounds):
        for kind in kinds:
            with tempfile.TemporaryDirectory() as directory:
                runs[kind].add(*measure(kind, seconds / rounds, Path(directory)))
            so_far = runs[kind].figures()
            shown = ", ".join(f"{name} {so_far[name]:.2f}" for name in (*TARGETS, "load_by_other_programs_cores"))
            print(f"turn {turn + 1} {kind}, so far: {shown}", flush=True)
    figures = {kind: one.figures() for kind, one in runs.items()}
    figures["sleeping_thread"] = sleeping_thread()
    metrics, targets = {}, {}
    if "normal" in figures:
        metrics, targets = {**figures.pop("normal"), "policy_parameters": runs["normal"].parameters}, dict(TARGETS)
    for kind in ("cameras", "fast_cameras"):
        for key, target in BESIDE_CAMERAS.items() if kind in figures else ():
            metrics[f"{kind}_{key}"] = figures[kind][key]
            if (kind, key) != ("fast_cameras", "lateness_p99_ms") and (seconds > LONG or "memory" not in key):
                targets[f"{kind}_{key}"] = target
    report(
        name,
        seeds=[0],
        budget={
            "seconds": seconds,
            "turns": rounds,
            "tick_rate_hz": TICK_RATE,
            "policy_rate_hz": POLICY_RATE,
            "policy_threads": 1,
        },
        metrics=metrics,
        peers=figures,
        targets=targets,
        notes=EXPLANATION,
    )


if __name__ == "__main__":
    main()
