"""How punctual the executor is beside policy inference, and how long an observation takes to become a command.

Two processes over ROS 2 on this machine: the executor of `hardware.executor` at 100 Hz with its default settings and
the safety chain on, and a policy of 4 M parameters that plans at each of its 20 steps per second on one thread (traced,
see `hardware.policy_process.trace_network`). In turn with it, so that whatever else runs on the machine disturbs all
alike: the same without the real-time priority that the default asks for, and the same tick called by an rclpy timer in
the thread that also serves the subscriptions, which is how a ROS 2 node is usually written.

Run: ``make bench NAME=control_loop`` or ``python benchmarks/control_loop.py [--seconds 60] [--rounds 3] [--extras]``.
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
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

TICK_RATE, POLICY_RATE, JOINTS, SAMPLE_STEPS = 100.0, 20.0, 7, 10
TARGETS = {
    "lateness_p99_ms": ["<=", 1.0],
    "missed_ticks": ["<=", 0],
    "latency_minus_inference_p99_ms": ["<=", 5.0],
}
EXPLANATION = (
    "Lateness: wake-up of a tick against its absolute deadline. Latency: measurement of an observation to the first "
    "command that its chunk brought about, over ROS 2 both ways; that command may replace the one of the present tick "
    "(share_within_tick of all). The figures with targets are without real-time priority. Peers ran in turn with it: "
    "realtime asks for that priority, as the executor does by default (realtime_priority says whether it was granted); "
    "rclpy_timer, at normal priority, calls the same tick from a timer. Extras, on request: on_ticks replaces no "
    "command, so that a chunk waits for the next tick; pinned keeps loop and policy to a processor each, which is for "
    "machines with nothing else to do."
)
KINDS: dict[str, dict[str, Any]] = {
    "normal": {"realtime_priority": 0},
    "realtime": {},
    "rclpy_timer": {"realtime_priority": 0},
    "on_ticks": {"realtime_priority": 0, "replace_within_tick": False},
    "pinned": {"realtime_priority": 0, "pin": True},
}
"""Settings of the executor by kind of run."""
EXTRAS = ("on_ticks", "pinned")
"""Kinds that run on request."""


# ---- the processes ---------------------------------------------------------------------------------------------------


def policy_role(output: Path, stop: threading.Event, kind: str) -> None:
    """Serve a random policy of realistic size; write when each observation was read and its chunk sent."""
    import torch

    from hardware.policy_process import serve, trace_network
    from hardware.robots.fake import FakeRobot
    from hardware.ros.link import RosPolicyLink
    from robot_rl.core.policy import ActionChunk
    from robot_rl.core.robot import StampedObservation
    from robot_rl.policies.chunked import ChunkedConfig, ChunkedPolicy

    torch.set_num_threads(1)
    torch.manual_seed(0)
    spec = FakeRobot(JOINTS, rate_hz=POLICY_RATE).spec
    policy = ChunkedPolicy(spec, ChunkedConfig(width=512, depth=3, execute_steps=1, sample_steps=SAMPLE_STEPS)).eval()
    times: dict[int, list[float]] = {}

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
    parameters = sum(one.numel() for one in policy.parameters())  # a traced network keeps none by that name
    try:
        trace_network(policy)
        serve(policy, link, stop, pin=kind == "pinned")
    finally:
        link.close()
    output.write_text(json.dumps({"parameters": parameters, "times": times}))


def executor_role(output: Path, stop: threading.Event, seconds: float, kind: str) -> None:
    """Run the executor for ``seconds``; write when it observed, got chunks and sent commands.

    ``kind`` is one of `KINDS`: ``rclpy_timer`` calls the tick from such a timer, the others run the executor's loop.
    """
    from hardware.executor import Executor, ExecutorConfig
    from hardware.realtime import release_realtime, request_realtime
    from hardware.robots.fake import FakeRobot
    from hardware.ros import convert
    from hardware.ros.link import RosExecutorLink
    from hardware.statistics import Durations
    from robot_rl.core.policy import ActionChunk
    from robot_rl.core.robot import StampedObservation

    observed, commanded = [], []
    stamps: dict[int, float] = {}
    arrived: dict[int, float] = {}
    polled: dict[int, float] = {}

    class TimedRobot(FakeRobot):
        def observe(self) -> StampedObservation:
            observed.append(time.monotonic())
            return super().observe()

        def command(self, action: np.ndarray) -> np.ndarray:
            sent = super().command(action)
            commanded.append(time.monotonic())
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
        values: ClassVar[list[float]] = []

        def add(self, seconds: float) -> None:
            super().add(seconds)
            self.values.append(seconds)

    lateness = ExactDurations()
    robot = TimedRobot(JOINTS, rate_hz=POLICY_RATE)
    link = TimedLink(robot.spec)
    config = ExecutorConfig(TICK_RATE, execute_steps=1, late_steps=3, autostart=True, **KINDS[kind])
    granted = request_realtime(config.realtime_priority)
    if granted:
        release_realtime()  # the loop asks for itself
    executor = Executor(robot, link, config)
    executor.lateness = lateness
    executor.connect()
    try:
        if kind == "rclpy_timer":
            timer_loop(executor, link, stop, seconds)
        else:
            executor.run(stop, seconds)
    finally:
        executor.shut_down()
        link.close()
    times = {"observed": observed, "commanded": commanded, "lateness": lateness.values[int(TICK_RATE / 2) :]}
    times |= {"stamps": stamps, "arrived": arrived, "polled": polled}
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


# ---- evaluation ------------------------------------------------------------------------------------------------------


def percentiles(values: Any, name: str) -> dict[str, float]:
    """Return p50, p99 and maximum of durations in seconds, as ``<name>_…_ms``."""
    found = 1e3 * np.percentile(np.asarray(values, float), [50, 99, 100])
    return dict(zip([f"{name}_p50_ms", f"{name}_p99_ms", f"{name}_max_ms"], map(float, found), strict=True))


def punctuality(times: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
    """Return all lateness (s) and the missed ticks against the grid of absolute deadlines, and every tick's deadline.

    Lateness is as the loop measured it; for a timer, whose schedule is its own, it is taken against the grid.
    The grid is where most ticks are: it begins with the earliest tick up to 0.5 ms before the densest 0.1 ms of all
    remainders by the period. The first half second (imports, first messages) is left out.
    """
    observed = np.asarray(times["observed"])
    observed = observed[observed > observed[0] + 0.5]
    period = 1.0 / TICK_RATE
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


def latencies(executor: dict[str, Any], policy: dict[str, Any]) -> Parts:
    """Return, in seconds per chunk, what passed between an observation and the command that its chunk brought about."""
    times, served = executor["times"], policy["times"]
    commanded = np.asarray(times["commanded"])
    _, deadlines = punctuality(times)
    parts: Parts = {"total": [], "inference": [], "transport": [], "wait": []}
    for seq, polled in times["polled"].items():
        if seq not in served or len(served[seq]) < 2 or not deadlines[0] < polled < commanded[-1]:
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
    start, (busy, own) = time.monotonic(), processor_seconds()
    with Supervisor(directory / kind) as supervisor:
        one_thread = {"OMP_NUM_THREADS": "1"}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="length of all runs of one kind together (s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns in which they are made")
    parser.add_argument("--extras", action="store_true", help=f"run {' and '.join(EXTRAS)} as well")
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--role", choices=("policy", "executor"), help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=KINDS, default="normal", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    from hardware.realtime import prepare_process

    stop = threading.Event()
    if arguments.role:
        if arguments.kind != "rclpy_timer":
            prepare_process()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        if arguments.role == "policy":
            policy_role(arguments.output, stop, arguments.kind)
        else:
            executor_role(arguments.output, stop, arguments.seconds, arguments.kind)
        return
    benchmark(arguments.seconds, arguments.rounds, [kind for kind in KINDS if arguments.extras or kind not in EXTRAS])


class Runs:
    """What the runs of one kind showed together."""

    def __init__(self) -> None:
        self.lateness: list[float] = []
        self.missed = 0
        self.parts: Parts = {}
        self.within, self.chunks, self.parameters, self.granted = 0, 0, 0, False
        self.others: list[float] = []

    def add(self, executor: dict[str, Any], policy: dict[str, Any], others: float) -> None:
        """Add one run."""
        figures, _ = punctuality(executor["times"])
        self.lateness += figures.pop("all")
        self.missed += figures["missed_ticks"]
        for name, values in latencies(executor, policy).items():
            self.parts.setdefault(name, []).extend(values)
        chunks = executor["report"]["chunks"]
        self.within += chunks.get("chunks_acted_within_tick", 0)
        self.chunks += chunks.get("chunks_accepted", 0)
        self.parameters, self.granted = policy["parameters"], executor["granted"]
        self.others.append(others)

    def figures(self) -> dict[str, float]:
        """Return the figures."""
        return {
            **percentiles(self.lateness, "lateness"),
            "missed_ticks": self.missed,
            **latency_figures(self.parts),
            "share_within_tick": self.within / max(1, self.chunks),
            "realtime_priority": self.granted,
            "load_by_other_programs_cores": float(np.mean(self.others)),
        }


def benchmark(seconds: float, rounds: int, kinds: list[str]) -> None:
    """Run ``kinds`` in turn, each ``rounds`` times and ``seconds`` in all, and report."""
    from benchmarks.common import report
    from hardware.ros.context import free_domain, prepare_environment

    prepare_environment(free_domain())
    runs = {kind: Runs() for kind in kinds}
    for turn in range(rounds):
        for kind in kinds:
            with tempfile.TemporaryDirectory() as directory:
                runs[kind].add(*measure(kind, seconds / rounds, Path(directory)))
            so_far = runs[kind].figures()
            shown = ", ".join(f"{name} {so_far[name]:.2f}" for name in (*TARGETS, "load_by_other_programs_cores"))
            print(f"turn {turn + 1} {kind}, so far: {shown}", flush=True)
    figures = {kind: one.figures() for kind, one in runs.items()}
    report(
        "control_loop",
        seeds=[0],
        budget={
            "seconds": seconds,
            "turns": rounds,
            "tick_rate_hz": TICK_RATE,
            "policy_rate_hz": POLICY_RATE,
            "policy_threads": 1,
        },
        metrics={**figures.pop("normal"), "policy_parameters": runs["normal"].parameters},
        peers=figures,
        targets=TARGETS,
        notes=EXPLANATION,
    )


if __name__ == "__main__":
    main()
