"""What happens when a part fails: every fault in every place, on every robot that runs here, in real time.

Places: the policy, a camera and the operator are processes of their own that are killed, stopped (SIGSTOP), hung in an
endless loop, or made to send nonsense, nothing, half or late; the state is what the robot measures; the far end is what
its driver talks to (an emulator, another process, the simulation). For each cell: how long until the robot brakes, how
far beyond a limit any command went, whether it ends at rest, and whether the mode and the log name the right reason.

Run: ``make bench NAME=fault_matrix`` or ``python benchmarks/fault_matrix.py [--drivers fake sim] [--places policy]
[--faults kill] [--jobs 2]``.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests" / "hardware"))

from benchmarks.fault_parts import Part, PartCamera
from hardware.control.arbiter import Mode
from hardware.control.executor import Executor, ExecutorConfig
from hardware.robots.fake import FaultyRobot
from hardware.safety.flags import HOLDING_FAULTS, STOPPING_FAULTS, flag_names
from hardware.transport import InProcessTransport
from robot_rl.core import registry
from robot_rl.core.errors import HardwareError
from robot_rl.core.policy import ActionChunk
from robot_rl.core.robot import Robot, StampedObservation
from robot_rl.core.teleop import OperatorEvent, OperatorInput

logger = logging.getLogger(__name__)
FAULTS = ("kill", "stop", "hang", "nan", "jump", "freeze", "drop", "delay", "disconnect")
PLACES = ("policy", "camera", "state", "operator", "far_end")
TARGETS = {
    "share_safe": [">=", 1.0],
    "share_named": [">=", 1.0],
    "worst_reaction_ms": ["<=", 100.0],
    "worst_reaction_ticks_to_bad_commands": ["<=", 1],
    "worst_excursion": ["<=", 0.0],
}
LATE = {"command_stale", "policy_starved"}
LOST = {"robot_fault", "state_stale", "camera_stale"}  # a base's laser is lost with it
LIMITED = {"position_limited", "velocity_limited", "acceleration_limited"}
OUTCOMES: dict[tuple[str, str], set[str]] = {
    **{("policy", fault): LATE for fault in ("kill", "stop", "hang", "freeze", "delay", "disconnect")},
    ("policy", "nan"): {"action_not_finite"},
    ("policy", "jump"): LIMITED,
    **{("camera", fault): {"camera_stale"} for fault in FAULTS if fault not in ("nan", "drop")},
    ("state", "nan"): {"observation_not_finite"},
    ("state", "jump"): {"tracking_error"},
    ("state", "freeze"): {"state_stale", "camera_stale"},  # a base's laser freezes with it, and was older already
    ("state", "delay"): {"state_stale"},
    ("state", "disconnect"): {"robot_fault"},
    **{("operator", fault): {"operator_lost"} for fault in FAULTS if fault not in ("jump", "drop")},
    **{("far_end", fault): LOST for fault in ("kill", "stop", "hang", "delay", "disconnect")},
}
"""What stops or, for a policy that jumps, limits the robot. The rest (half lost, too large a wish) may go on."""
NO_SENSE = {
    ("camera", "nan"): "images are integers",
    **{("state", fault): "it comes with the far end" for fault in ("kill", "stop", "hang")},
    **{("far_end", fault): "what it says wrongly is the state's" for fault in ("nan", "jump", "freeze")},
}
SETTINGS = ExecutorConfig(
    execute_steps=1,
    late_steps=1,
    blend_seconds=0.0,
    max_command_age=0.085,
    max_state_age=0.06,
    max_camera_age=0.08,
    operator_timeout=0.08,
    tracking_seconds=0.1,
    status_rate_hz=2.0,
)
"""Ages that leave a tick of 10 ms before the 100 ms are over."""
SETTLE, WATCHED, BRAKING, PATIENCE = 0.25, 0.7, 0.5, 15.0
REASONS = set(flag_names(HOLDING_FAULTS | STOPPING_FAULTS)) | {"no_plan"}


# ---- robots ----------------------------------------------------------------------------------------------------------


class Bench:
    """One robot with what can be done to its far end."""

    def __init__(self, robot: Robot, faults: dict[str, Callable[[], None]], close: Callable[[], None]) -> None:
        self.robot, self.faults, self.close = robot, faults, close


def simulated(folder: Path) -> Bench:
    """Return the peg task, whose physics thread is the far end."""
    from hardware.robots.sim import SimRobot

    robot = SimRobot("peg_insert", restart=False)
    inside: Any = robot.env
    advance = inside.advance

    def fail(*_: Any) -> None:
        raise RuntimeError("the simulation failed (injected fault)")

    def hang(*arguments: Any) -> None:
        time.sleep(WATCHED)
        advance(*arguments)

    def set_to(action: Callable[..., None]) -> Callable[[], None]:
        return lambda: setattr(inside, "advance", action)

    faults = {"kill": set_to(fail), "stop": set_to(hang), "hang": set_to(hang), "disconnect": robot.disconnect}
    return Bench(robot, faults, robot.disconnect)


def on_the_bench(name: str) -> Callable[[Path], Bench]:
    """Return the maker of a driver's bench of the tests, with its emulator."""

    def make(folder: Path) -> Bench:
        from driver_benches import BENCHES

        bench = BENCHES[name](folder)
        process = getattr(bench, "process", None)
        faults: dict[str, Callable[[], None]] = {}
        if process is not None:
            faults = {"kill": process.kill, "stop": bench.silence, "disconnect": process.terminate}
            faults["delay"] = lambda: pause(process.pid)
        elif hasattr(bench, "bus"):
            faults = dict.fromkeys(("kill", "stop", "hang", "disconnect"), bench.silence)
            faults["drop"] = lambda: repeat(lambda: bench.hiccup(1), 0.02)
        robot = bench.robot.robot if isinstance(bench.robot, FaultyRobot) else bench.robot
        return Bench(robot, faults, bench.close)

    return make


def pause(pid: int) -> None:
    """Stop a process for 300 ms."""
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(0.3, os.kill, (pid, signal.SIGCONT)).start()


def repeat(action: Callable[[], None], period: float) -> None:
    """Do something again and again while a cell is watched."""

    def work() -> None:
        for _ in range(int(WATCHED / period)):
            action()
            time.sleep(period)

    threading.Thread(target=work, daemon=True).start()


def drivers() -> tuple[dict[str, Callable[[Path], Bench]], list[str]]:
    """Return the robots that run here, by name, and the registered ones that do not."""
    from driver_benches import BENCHES

    from hardware.ros.context import available

    found: dict[str, Callable[[Path], Bench]] = {"sim": simulated}
    found |= {name: on_the_bench(name) for name in BENCHES if available() or not name.startswith("ros")}
    missing = [name for name in registry.names("robots") if not any(one.startswith(name) for one in found)]
    return found, missing


# ---- one cell --------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What one fault in one place did to one robot."""

    driver: str
    place: str
    fault: str
    skipped: str = ""
    """Why it makes no sense here; empty if it was tried."""
    reaction_ms: float | None = None
    """From the fault to the first command that brakes; None where the robot went on."""
    ticks: int | None = None
    """Ticks with a bad command in force before one of them was answered."""
    excursion: float = 0.0
    """Largest excess of a command over a limit of position, velocity or acceleration, in its unit per tick."""
    reason: str = ""
    """Why it stopped, or what limited it."""
    safe: bool = False
    named: bool = False


@dataclass
class Watch:
    """Every tick of one run: when, flags, mode, and the command in force."""

    times: list[float] = field(default_factory=list)
    flags: list[int] = field(default_factory=list)
    commands: list[np.ndarray] = field(default_factory=list)

    def around(self, executor: Executor) -> None:
        """Note what each tick of ``executor`` does."""
        tick = executor.tick

        def noted(closing: bool = False) -> Any:
            self.commands.append(executor.safety.command)  # what was in force until now
            verdict = tick(closing)
            self.times.append(time.monotonic())
            self.flags.append(verdict.flags)
            return verdict

        executor.tick = noted  # type: ignore[method-assign]

    def excursion(self, robot: Robot, dt: float) -> float:
        """Return the largest excess over a limit."""
        commands, limits = np.array(self.commands), robot.limits
        steps = np.diff(commands, axis=0)
        changes = np.diff(steps, axis=0)
        place = max((commands - limits.high).max(), (limits.low - commands).max())
        step = (np.abs(steps) - np.asarray(limits.velocity) * dt).max()
        return float(max(place, step, (np.abs(changes) - np.asarray(limits.acceleration) * dt**2).max(), 0.0))


class NotReadyError(RuntimeError):
    """A run came to its end before the fault, as on a machine that is busy with other things."""


class Cell:
    """Runs one robot until it drives, breaks one part, and watches."""

    def __init__(self, outcome: Outcome, make: Callable[[Path], Bench], folder: Path, settings: ExecutorConfig) -> None:
        self.outcome, place = outcome, outcome.place
        self.bench = make(folder)
        self.parts: list[Part] = []
        robot = self.bench.robot
        if place == "camera":
            from hardware.cameras.rig import RobotWithCameras

            self.camera = PartCamera(self._part("camera"))
            robot = RobotWithCameras(robot, {"injected": self.camera})
        self.robot = FaultyRobot(robot)
        self.transport = InProcessTransport(quiet=True)
        rate = self.robot.spec.rate_hz
        settings = replace(settings, tick_rate_hz=rate * math.ceil(settings.tick_rate_hz / rate - 1e-6))
        self.executor = Executor(self.robot, self.transport.executor, settings)
        self.watch, self.log = Watch(), Names()
        self.bad_at: float | None = None

    def _part(self, role: str, **options: Any) -> Part:
        part = Part(role, options)
        self.parts.append(part)
        return part

    def run(self) -> Outcome:
        """Run the cell and judge it."""
        outcome, executor, stop = self.outcome, self.executor, threading.Event()
        thread = threading.Thread(target=executor.run, args=(stop,))
        try:
            try:
                executor.connect()
            except HardwareError as error:
                raise NotReadyError(str(error)) from error
            self._policy()
            part = self._operator()
            self.watch.around(executor)
            thread.start()
            self._wait_for(Mode.AUTO, OperatorEvent.ENABLE)
            if part is not None:
                part.tell(drive=0.5)
                self._wait_for(Mode.HUMAN)
            time.sleep(SETTLE + random.uniform(0.0, 0.05))
            mode = executor.arbiter.mode
            if mode not in (Mode.AUTO, Mode.HUMAN):
                raise NotReadyError(f"{outcome} ended before the fault: {mode.value}, {executor.arbiter.reason}")
            changes, counts, begun = len(executor.arbiter.changes), dict(executor.safety.counts), time.monotonic()
            with self.log:
                self._break()
                time.sleep(WATCHED)
                self._let_it_brake()
            self._judge(begun, changes, counts)
        finally:
            stop.set()
            if thread.ident is not None:
                thread.join(10.0)
            executor.shut_down()
            for part in self.parts:
                part.close()
            self.bench.close()
        return outcome

    def _policy(self) -> None:
        """Plan swings about where the robot is: in a process if that is to fail, else at once."""
        limits, rate = self.robot.limits, self.robot.spec.rate_hz
        base = np.clip(self.robot.hold_command(), limits.low, limits.high)
        room = np.minimum(limits.high - base, base - limits.low)
        swing = np.minimum(0.05 * np.asarray(limits.velocity, float), 0.5 * room)
        transport, poll = self.transport, self.transport.executor.poll_chunk

        def noted() -> ActionChunk | None:
            chunk = poll()
            if chunk is not None and self.bad_at is None and not np.abs(chunk.actions).max() < 100.0:
                self.bad_at = time.monotonic()
            return chunk

        transport.executor.poll_chunk = noted  # type: ignore[method-assign]
        if self.outcome.place == "policy":
            part = self._part("policy", base=base.tolist(), swing=swing.tolist(), rate=rate)
            transport.executor.send_observation = (  # type: ignore[method-assign]
                lambda observation: part.tell(seq=observation.seq, stamp=observation.stamp)
            )
            part.listen(lambda said: transport.policy.send_chunk(chunk_of(said)))
            return
        from benchmarks.fault_parts import swing_chunk

        def answer(observation: StampedObservation) -> None:
            actions = swing_chunk(base, swing, rate, observation.seq).astype(np.float32)
            transport.policy.send_chunk(ActionChunk(actions, observation.seq, observation.stamp))

        transport.executor.send_observation = answer  # type: ignore[method-assign]

    def _operator(self) -> Part | None:
        if self.outcome.place != "operator":
            return None
        size = self.robot.spec.action.size
        part = self._part("operator", size=size)

        def hear(said: dict[str, Any]) -> None:
            stamp = min(float(said["stamp"]), time.monotonic())  # nobody is younger than he says
            motion = np.asarray(said["motion"], float)
            self.transport.send_operator(OperatorInput(stamp, said["seq"], bool(motion.any()), motion))

        part.listen(hear)
        return part

    def _wait_for(self, mode: Mode, event: OperatorEvent | None = None) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.executor.arbiter.mode is not mode:
            if time.monotonic() > deadline:
                arbiter = self.executor.arbiter
                raise NotReadyError(f"{self.outcome}: never {mode.value} but {arbiter.mode.value}, {arbiter.reason}")
            if event is not None and self.executor.arbiter.mode in (Mode.IDLE, Mode.HOLD):
                wish = event if self.executor.arbiter.mode is Mode.IDLE else OperatorEvent.HAND_BACK
                size = self.robot.spec.action.size
                self.transport.send_operator(OperatorInput(time.monotonic(), 0, False, np.zeros(size), (wish,)))
            if self.executor.arbiter.mode is Mode.STOPPED:
                raise NotReadyError(f"{self.outcome}: stopped by {self.executor.arbiter.reason} before the fault")
            time.sleep(0.02)

    def _break(self) -> None:
        place, fault = self.outcome.place, self.outcome.fault
        if place == "far_end":
            self.bench.faults[fault]()
        elif place == "state":
            span = np.asarray(self.robot.limits.high) - np.asarray(self.robot.limits.low)
            far = float(max(0.2 * np.max(self.robot.limits.velocity), 0.3 * np.max(span)))
            value = {"nan": True, "jump": far, "freeze": True, "drop": 0.5, "delay": 0.3, "disconnect": True}
            name = {"nan": "not_a_number", "delay": "delay_seconds", "disconnect": "disconnected"}.get(fault, fault)
            setattr(self.robot.faults, name, value[fault])
        else:
            self.parts[0].fail(fault)

    def _let_it_brake(self) -> None:
        """Wait while nobody drives and it moves: what stops and goes may just have been stopped again."""
        deadline = time.monotonic() + BRAKING
        while self.executor.arbiter.writer == "none" and self.executor.safety.moving and time.monotonic() < deadline:
            time.sleep(0.01)

    def _judge(self, begun: float, changes: int, counts: dict[str, int]) -> None:
        """Fill in what came of it."""
        outcome, executor, watch = self.outcome, self.executor, self.watch
        place, fault = outcome.place, outcome.fault
        wanted = OUTCOMES.get((place, fault))
        stopped = next((one for one in executor.arbiter.changes[changes:] if one[1] in (Mode.HOLD, Mode.STOPPED)), None)
        if stopped is not None and stopped[0] < begun:
            raise NotReadyError(f"{outcome}: stopped by {stopped[2]} just before the fault")
        bad = (place, fault) in (("policy", "nan"), ("policy", "jump"))
        if bad and (self.bad_at is None or (stopped is not None and stopped[0] < self.bad_at)):
            raise NotReadyError(f"{outcome}: the bad command never came")
        outcome.excursion = watch.excursion(self.robot, executor.dt)
        at_rest = not executor.safety.moving
        if wanted is not None and wanted <= LIMITED:
            counted = {name for name, count in executor.safety.counts.items() if count > counts.get(name, 0)}
            outcome.reason = ", ".join(sorted(counted & LIMITED))
            outcome.named, outcome.safe = bool(counted & wanted), outcome.excursion <= 0.0
        elif wanted is None:  # it may go on, or stop and say why
            outcome.reason = "rides it out" if stopped is None else stopped[2]
            outcome.named = stopped is None or stopped[2] in REASONS
            went_on = stopped is None or executor.arbiter.writer != "none"
            outcome.safe = outcome.excursion <= 0.0 and (went_on or at_rest)
        elif stopped is not None:
            outcome.reason = stopped[2]
            outcome.named = stopped[2] in wanted and stopped[2] in self.log.found
            outcome.safe = at_rest and outcome.excursion <= 0.0 and executor.arbiter.writer == "none"
        if bad:
            after = [flags for when, flags in zip(watch.times, watch.flags, strict=True) if when > self.bad_at]
            answered = next((k for k, flags in enumerate(after) if set(flag_names(flags)) & wanted), None)
            outcome.ticks = None if answered is None else answered + 1
        elif wanted is not None and stopped is not None:
            outcome.reaction_ms = 1e3 * (stopped[0] - begun)


def chunk_of(said: dict[str, Any]) -> ActionChunk:
    """Return the chunk that a policy's process said."""
    return ActionChunk(np.asarray(said["actions"], np.float32), int(said["seq"]), float(said["stamp"]))


class Names(logging.Handler):
    """Collects the words of the log while it is entered."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.found: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Take the words of one record."""
        self.found |= set(record.getMessage().replace("(", " ").replace(")", " ").split())

    def __enter__(self) -> Names:
        self.before = logging.getLogger("hardware").level
        logging.getLogger("hardware").setLevel(logging.INFO)
        logging.getLogger("hardware").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("hardware").removeHandler(self)
        logging.getLogger("hardware").setLevel(self.before)


def run_cell(driver: str, place: str, fault: str, settings: ExecutorConfig = SETTINGS, attempts: int = 6) -> Outcome:
    """Run one cell; one that did not come as far as its fault (a busy machine) is tried again."""
    if (place, fault) in NO_SENSE:
        return Outcome(driver, place, fault, NO_SENSE[place, fault])
    known, _ = drivers()
    for _ in range(attempts):
        with tempfile.TemporaryDirectory() as folder:
            cell = Cell(Outcome(driver, place, fault), known[driver], Path(folder), settings)
            if place == "far_end" and fault not in cell.bench.faults:
                cell.bench.close()
                why = "the robot has no far end" if not cell.bench.faults else "its emulator cannot do that"
                return Outcome(driver, place, fault, why)
            if (place, fault) == ("state", "jump") and cell.executor.targets.resting.all():
                cell.bench.close()
                return Outcome(driver, place, fault, "commands are rates, which no position contradicts")
            try:
                return cell.run()
            except NotReadyError as error:
                logger.warning("%s", error)
    return Outcome(driver, place, fault, reason="never came as far as the fault")


# ---- all cells -------------------------------------------------------------------------------------------------------


def work(cells: list[str], output: Path) -> None:
    """Run ``driver:place:fault`` cells one after the other and write what came of them, line by line."""
    logging.disable(logging.NOTSET)
    logging.getLogger().addHandler(logging.NullHandler())
    with output.open("w") as file:
        for cell in cells:
            outcome = run_cell(*cell.split(":"))
            file.write(json.dumps(vars(outcome)) + "\n")
            file.flush()


def spread(cells: list[str], jobs: int, domains: list[int]) -> list[Outcome]:
    """Run the cells in ``jobs`` processes, each in a ROS domain of its own, and return what came of them."""
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for k in range(min(jobs, len(cells))):
            output = Path(folder) / f"{k}.jsonl"
            own = [sys.executable, str(Path(__file__).resolve())]
            command = [*own, "--output", str(output), "--cells", *cells[k::jobs]]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            if domains:
                environment["ROS_DOMAIN_ID"] = str(domains[k])
            running.append((subprocess.Popen(command, env=environment), output))
        found = []
        for process, output in running:
            if process.wait() != 0:
                raise SystemExit(f"a worker ended with {process.returncode}")
            found += [Outcome(**json.loads(line)) for line in output.read_text().splitlines()]
    return found


def figures(outcomes: list[Outcome]) -> dict[str, float]:
    """Return the figures of the cells that were tried."""
    tried = [one for one in outcomes if not one.skipped]
    times = [one.reaction_ms for one in tried if one.reaction_ms is not None]
    ticks = [one.ticks for one in tried if one.ticks is not None]
    return {
        "cells": len(tried),
        "share_safe": float(np.mean([one.safe for one in tried])),
        "share_named": float(np.mean([one.named for one in tried])),
        "median_reaction_ms": float(np.median(times)) if times else 0.0,
        "worst_reaction_ms": float(max(times, default=0.0)),
        "worst_reaction_ticks_to_bad_commands": max(ticks, default=0),
        "worst_excursion": max(one.excursion for one in tried),
    }


def told(one: Outcome) -> str:
    """Return one line for a cell."""
    if one.skipped:
        return f"not tried: {one.skipped}"
    when = "" if one.reaction_ms is None else f" after {one.reaction_ms:.0f} ms"
    when = when if one.ticks is None else f" in tick {one.ticks}"
    verdict = "" if one.safe and one.named else " UNSAFE" if not one.safe else " NOT NAMED"
    return (one.reason or "went on") + when + verdict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    known, missing = drivers()
    parser.add_argument("--drivers", nargs="*", choices=known, default=list(known))
    parser.add_argument("--places", nargs="*", choices=PLACES, default=PLACES)
    parser.add_argument("--faults", nargs="*", choices=FAULTS, default=FAULTS)
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time")
    parser.add_argument("--cells", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cells is not None:
        work(arguments.cells, arguments.output)
        return
    from benchmarks.common import report

    domains: list[int] = []
    if any(name.startswith("ros") for name in arguments.drivers):
        from hardware.ros.context import free_domain, prepare_environment

        prepare_environment()
        while len(domains) < arguments.jobs:
            domains = list({*domains, free_domain()})
    cells = [f"{d}:{p}:{f}" for d in arguments.drivers for p in arguments.places for f in arguments.faults]
    start = time.monotonic()
    outcomes = spread(cells, arguments.jobs, domains)
    tables: dict[str, Any] = {}
    for one in sorted(outcomes, key=lambda one: cells.index(f"{one.driver}:{one.place}:{one.fault}")):
        tables.setdefault(one.driver, {})[f"{one.place} {one.fault}"] = told(one)
        print(f"{one.driver:20} {one.place:9} {one.fault:11} {told(one)}", flush=True)
    report(
        "fault_matrix",
        seeds="random moments",
        budget={"seconds": round(time.monotonic() - start), "at_a_time": arguments.jobs, "drivers": arguments.drivers},
        metrics=figures(outcomes),
        peers=tables,
        targets=TARGETS,
        notes="Reaction: from the fault to the first tick that brakes, with the ages of SETTINGS (command 85 ms, "
        "camera and operator 80 ms, state 60 ms) at 100 Hz. Bad commands (NaN and jumps of the policy): the tick that "
        "answers; 1 is the one in which they came. Excursion: of commands beyond limits of position, velocity and "
        f"acceleration. peers: every cell. Robots that cannot run here: {', '.join(missing) or 'none'}.",
    )


if __name__ == "__main__":
    main()
