"""How long from a key or a message until the robot follows the human, or brakes; and how smooth the seams of plans are.

The executor runs in real time at 100 Hz with a policy that drives. Keys go through a pseudo terminal, as typed ones do,
at moments that have nothing to do with the ticks. Messages come from another process over ROS 2, presses in a browser
from a headless Chromium on the console's page. Seams are measured without a clock: every inference delay from none to
the whole horizon of the plan.

Run: ``make bench NAME=takeover`` or ``python benchmarks/takeover.py [--cycles 40]``.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import logging
import math
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests" / "hardware"))

from benchmarks.common import report
from benchmarks.fault_parts import swing_chunk
from hardware.control.arbiter import Mode
from hardware.control.executor import Executor, ExecutorConfig
from hardware.control.realtime import prepare_process
from hardware.robots.fake import FakeRobot
from hardware.teleop.keyboard import KeyboardTeleop
from hardware.transport import InProcessTransport
from robot_rl.core.policy import ActionChunk
from robot_rl.core.robot import StampedObservation
from robot_rl.core.teleop import OperatorEvent, OperatorInput, Teleop

SIZE, RATE, PATIENCE = 6, 20.0, 20.0
TARGETS = {
    "keyboard_takeover_p99_ms": ["<=", 15.0],
    "keyboard_estop_p99_ms": ["<=", 15.0],
    "topic_estop_p99_ms": ["<=", 5.0],
    "browser_estop_p99_ms": ["<=", 80.0],
    "seam_jump_in_one_step_limits": ["<=", 1.0],
}


class TimedRobot(FakeRobot):
    """Notes when each command came, and who wrote it."""

    def __init__(self) -> None:
        super().__init__(SIZE, rate_hz=RATE)
        self.writer: Callable[[], tuple[str, str]] = lambda: ("", "")
        self.times: list[tuple[float, str, str, np.ndarray]] = []
        """(monotonic time, writer, mode, command)."""

    def command(self, action: np.ndarray) -> np.ndarray:
        """Take a command and note it."""
        sent = super().command(action)
        self.times.append((time.monotonic(), *self.writer(), sent))
        return sent


class Stage:
    """An executor in real time, driven by a policy that answers at once."""

    def __init__(self, link: Any, teleop: Teleop | None = None) -> None:
        self.robot = TimedRobot()
        config = ExecutorConfig(execute_steps=4, late_steps=2, max_state_age=0.5, operator_timeout=0.5)
        self.executor = Executor(self.robot, link, config, teleop=teleop)
        arbiter = self.executor.arbiter
        self.robot.writer = lambda: (arbiter.writer, arbiter.mode.value)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self.executor.run, args=(self._stop,))

    def __enter__(self) -> Stage:
        self.executor.connect()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10.0)
        self.executor.shut_down()

    def wait_for(self, mode: Mode, again: Callable[[], None] | None = None) -> None:
        """Wait until the arbiter is in ``mode``; ``again`` is called every 0.5 s until it is."""
        deadline, due = time.monotonic() + PATIENCE, time.monotonic() + 0.5
        while self.executor.arbiter.mode is not mode:
            now = time.monotonic()
            if now > deadline:
                raise SystemExit(f"never {mode.value} but {self.executor.arbiter.mode.value}")
            if again is not None and now > due:
                due = now + 0.5
                again()
            time.sleep(0.005)

    def first(self, since: float, fits: Callable[[str, str], bool]) -> float:
        """Return the seconds from ``since`` to the first command whose writer and mode fit."""
        deadline, seen = time.monotonic() + PATIENCE, 0
        while time.monotonic() < deadline:
            times = self.robot.times
            while seen < len(times):
                when, writer, mode, _ = times[seen]
                if when >= since and fits(writer, mode):
                    return when - since
                seen += 1
            time.sleep(0.002)
        raise SystemExit("no such command came")

    def still(self, since: float) -> float:
        """Return the seconds from ``since`` to the first command that repeats the one before."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            after = [one for one in self.robot.times[-400:] if one[0] >= since]
            for before, one in itertools.pairwise(after):
                if np.array_equal(before[3], one[3]) and one[2] == Mode.STOPPED.value:
                    return one[0] - since
            time.sleep(0.005)
        raise SystemExit("the robot never came to rest")


def policy_of(stage_robot: TimedRobot, transport: InProcessTransport) -> Callable[[StampedObservation], None]:
    """Return what answers an observation with a plan of slow swings."""
    base, swing = np.zeros(SIZE), np.full(SIZE, 0.05)

    def answer(observation: StampedObservation) -> None:
        actions = swing_chunk(base, swing, RATE, observation.seq).astype(np.float32)
        transport.policy.send_chunk(ActionChunk(actions, observation.seq, observation.stamp))

    return answer


Found = dict[str, list[float]]


def pause(shortest: float) -> None:
    """Wait a while that has nothing to do with the ticks."""
    time.sleep(shortest + random.uniform(0.0, 0.05))


# ---- where wishes come from ------------------------------------------------------------------------------------------


def keyboard(cycles: int) -> Found:
    """Measure keys: take over by key and by motion, hand back, emergency stop."""
    found: Found = {"takeover": [], "hand_back": [], "estop": [], "estop_to_rest": []}
    master, slave = os.openpty()
    transport, teleop = InProcessTransport(quiet=True), KeyboardTeleop(SIZE, file_descriptor=slave)
    teleop.connect()

    def press(key: str) -> float:
        now = time.monotonic()
        os.write(master, key.encode())
        return now

    with Stage(transport.executor, teleop) as stage:
        transport.executor.send_observation = policy_of(stage.robot, transport)  # type: ignore[method-assign]
        for cycle in range(cycles):
            stage.wait_for(Mode.AUTO, lambda: press("n") and press("b"))
            pause(0.3)
            pressed = press("wt"[cycle % 2])
            found["takeover"].append(stage.first(pressed, lambda writer, _: writer == "human"))
            pause(0.3)
            if cycle % 4 < 2:
                found["hand_back"].append(stage.first(press("b"), lambda writer, _: writer == "policy"))
                stage.wait_for(Mode.AUTO)
                pause(0.1)
            pressed = press(" ")
            found["estop"].append(stage.first(pressed, lambda _, mode: mode == Mode.STOPPED.value))
            found["estop_to_rest"].append(stage.still(pressed))
            press("r")
            stage.wait_for(Mode.IDLE, lambda: press("r"))
    teleop.disconnect()
    os.close(master)
    os.close(slave)
    return found


def topic(cycles: int) -> Found:
    """Measure messages from another process: emergency stop and take-over."""
    from hardware.ros.link import RosExecutorLink

    found: Found = {"takeover": [], "estop": [], "estop_to_rest": []}
    transport, robot = InProcessTransport(quiet=True), TimedRobot()
    link = RosExecutorLink(robot.spec)
    link.poll_chunk = transport.executor.poll_chunk  # type: ignore[method-assign]
    own = [sys.executable, str(Path(__file__).resolve()), "--console"]
    console = subprocess.Popen(own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(what: str) -> float:
        assert console.stdin is not None
        assert console.stdout is not None
        console.stdin.write(what + "\n")
        console.stdin.flush()
        return float(console.stdout.readline())

    try:
        with Stage(link) as stage:
            link.send_observation = policy_of(stage.robot, transport)  # type: ignore[method-assign]
            ask("ready")
            for _ in range(cycles):
                stage.wait_for(Mode.AUTO, lambda: ask("enable") and ask("hand_back"))
                pause(0.1)
                sent = ask("take_over")
                found["takeover"].append(stage.first(sent, lambda writer, _: writer == "human"))
                pause(0.25)
                ask("hand_back")
                stage.wait_for(Mode.AUTO, lambda: ask("hand_back"))
                pause(0.1)
                sent = ask("press")
                found["estop"].append(stage.first(sent, lambda _, mode: mode == Mode.STOPPED.value))
                found["estop_to_rest"].append(stage.still(sent))
                ask("release")
                stage.wait_for(Mode.IDLE, lambda: ask("reset"))
    finally:
        console.kill()
        console.wait(10.0)
        link.close()
    return found


def console_process() -> None:
    """Send what is asked for on stdin over ROS 2, and answer with the time at which that was."""
    from hardware.ros.link import RosOperatorLink

    prepare_process()
    link, seq = RosOperatorLink(), 0
    events = {event.value: (event,) for event in OperatorEvent}
    alive = threading.Event()
    lock = threading.Lock()

    def send(happened: tuple[OperatorEvent, ...]) -> float:
        nonlocal seq
        with lock:
            seq += 1
            now = time.monotonic()
            link.send_operator(OperatorInput(now, seq, False, np.zeros(SIZE), happened))
        return now

    def heartbeat() -> None:
        while not alive.wait(0.02):
            send(())

    for line in sys.stdin:
        what = line.strip()
        if what == "ready":
            link.wait_for_robot(PATIENCE)
            threading.Thread(target=heartbeat, daemon=True).start()
            now = time.monotonic()
        elif what in ("press", "release"):
            now = time.monotonic()
            link.set_estop(what == "press")
        else:
            now = send(events[what])
        sys.stdout.write(f"{now!r}\n")
        sys.stdout.flush()


def browser(cycles: int) -> Found:
    """Press the buttons of the console's page in a headless Chromium; from before the press is handed to it."""
    from benchmarks.console_latency import Stage, headless_browser, open_page, stop_clicks, takeovers

    with Stage() as stage, headless_browser() as chromium:
        page = open_page(chromium, stage)
        return {"estop": stop_clicks(page, stage, cycles), "takeover": takeovers(page, stage, cycles)[0]}


def browser_available() -> bool:
    """Return whether there is a Chromium, what drives it, and the console."""
    from benchmarks.console_latency import find_chromium

    return find_chromium() is not None and all(importlib.util.find_spec(name) for name in ("playwright", "viser"))


SOURCES: dict[str, Callable[[int], Found]] = {"keyboard": keyboard, "topic": topic, "browser": browser}
"""Where wishes come from."""


# ---- seams -----------------------------------------------------------------------------------------------------------


def seams(ticks: int = 600) -> dict[str, float]:
    """Return the largest steps of commands and of what was planned, over inference delays of 0 to the whole horizon."""
    from deployment_rig import Rig, WanderingPolicy

    jumps, planned, starved = [], [], 0
    horizon, execute = 8, 4
    for delay in range(horizon + 1):
        rig = Rig(
            WanderingPolicy(FakeRobot().spec, horizon=horizon, execute_steps=execute, speed=0.02),
            late_steps=horizon - execute,
            max_command_age=10.0,
        )
        rig.start()
        waiting: list[tuple[int, ActionChunk]] = []
        send, rate = rig.transport.policy.send_chunk, rig.executor.ticks_per_step
        playback = rig.executor.playback
        rig.server.link.send_chunk = lambda chunk, kept=waiting, at=playback: kept.append((at.step, chunk))
        limits, dt, last, wish = rig.plain.limits, rig.executor.dt, rig.executor.safety.command.copy(), None
        for _ in range(ticks):
            while waiting and playback.step - waiting[0][0] >= delay:
                send(waiting.pop(0)[1])
            rig.tick(*([OperatorEvent.HAND_BACK] if rig.mode == "hold" else []))
            command, action = rig.executor.safety.command, playback.action()
            jumps.append(float((np.abs(command - last) / (limits.velocity * dt)).max()))
            if action is not None and wish is not None:
                planned.append(float((np.abs(action - wish) / (limits.velocity * dt * rate)).max()))
            last, wish = command.copy(), None if action is None else action.copy()
        starved += rig.executor.safety.counts["policy_starved"] > 0
    return {
        "seam_jump_in_one_step_limits": max(jumps),
        "planned_seam_in_policy_step_limits": max(planned),
        "delays_measured": horizon + 1,
        "delays_that_starve": starved,
    }


# ---- all together ----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cycles", type=int, default=40, help="times that each thing is done")
    parser.add_argument("--console", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.console:
        console_process()
        return
    from hardware.ros.context import available, free_domain, prepare_environment

    if available():
        prepare_environment(free_domain())
    prepare_process()
    logging.getLogger().addHandler(logging.NullHandler())  # what is provoked here need not be shown
    metrics: dict[str, float] = {"browser_estop_p99_ms": math.nan}
    for source, measure in SOURCES.items():
        if (source == "topic" and not available()) or (source == "browser" and not browser_available()):
            continue
        for name, values in measure(arguments.cycles).items():
            p50, p99 = 1e3 * np.percentile(values, [50, 99])
            metrics |= {f"{source}_{name}_p50_ms": float(p50), f"{source}_{name}_p99_ms": float(p99)}
    metrics |= seams()
    report(
        "takeover",
        seeds=[0],
        budget={"cycles": arguments.cycles, "tick_rate_hz": 100.0, "policy_rate_hz": RATE},
        metrics=metrics,
        targets=TARGETS,
        notes="From the key in the terminal, or the message in another process, to the first command written by the "
        "human, by the policy again, or by the brake of a stop; estop_to_rest: to the first command that repeats the "
        "one before, braking within the limits from the policy's motion. An emergency stop by message is answered "
        "between ticks; keys and take-overs at the next tick. Seams: largest step of commands per tick against the "
        "velocity limit, with plans 0 to 8 policy steps late. Browser: from the press in a headless Chromium on the "
        "same machine to the first command from which on none moves.",
    )


if __name__ == "__main__":
    main()
