"""From a click in the browser to the robot: emergency stop until no command moves any more, takeover, and its loss.

A real headless Chromium clicks on the page of a running deployment in one process, with a robot that is where its
command is. Times begin before the click is handed to the browser, so that the browser's own part is in them.

    make bench NAME=console_latency          # needs Chromium (Debian: apt-get install chromium) and the extra 'console'

Other benchmarks call `stop_clicks`.
"""

from __future__ import annotations

import argparse
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.common import report
from hardware.console.feed import ExecutorFeed
from hardware.console.server import Console, ConsoleConfig
from hardware.control.arbiter import DRIVEN, Mode
from hardware.control.executor import Executor, ExecutorConfig
from hardware.policy_process import PolicyServer
from hardware.robots.fake import FakeRobot
from hardware.transport import InProcessTransport
from robot_rl.core.spec import Spec
from robot_rl.core.teleop import OperatorEvent

NAMES = ("x", "y", "z")
TARGETS = {"stop_p99_ms": ("<=", 80.0), "takeover_p99_ms": ("<=", 80.0)}
FLAGS = ("--no-sandbox", "--disable-dev-shm-usage", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")
"""Chromium without a screen or a graphics card, as root in a container."""
PATIENCE = 60.0
"""Seconds to wait for what must happen, however busy the machine."""
_SPEED = 0.05
_STILL = 1e-9


def find_chromium() -> str | None:
    """Return the path of an installed Chromium, None where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


@contextmanager
def headless_browser() -> Iterator[Any]:
    """Yield a Chromium driven by playwright; it is closed at the end."""
    from playwright.sync_api import sync_playwright

    path = find_chromium()
    if path is None:
        raise SystemExit("no Chromium found: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS), timeout=1e3 * PATIENCE)
        try:
            yield browser
        finally:
            browser.close()


def wait_until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> None:
    """Wait for ``condition``; raises `TimeoutError` naming ``what`` did not happen."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {seconds:g} s")
        time.sleep(0.002)


class TimedRobot(FakeRobot):
    """Notes when it got which command."""

    def __init__(self, **options: Any) -> None:
        super().__init__(3, **options)
        self.spec = Spec(self.spec.observation, replace(self.spec.action, names=NAMES), self.spec.rate_hz)
        self.times: list[float] = []
        """Monotonic time (s) of every command in ``commands``."""

    def command(self, action: np.ndarray) -> np.ndarray:
        """Go there at once."""
        self.times.append(time.monotonic())
        return super().command(action)

    def still_since(self, start: float) -> float:
        """Return when the first command came after ``start`` (s) from which on none moved the robot; inf if none."""
        count = len(self.times)
        times, commands = np.array(self.times[:count]), np.array(self.commands[:count])
        moved = np.flatnonzero(np.abs(np.diff(commands, axis=0)).max(-1) > _STILL)
        first = int(moved[-1]) + 2 if len(moved) else 0
        after = times[max(first, int(np.searchsorted(times, start))) :]
        return float(after[0]) if len(after) else np.inf


class Sweep:
    """A policy that sweeps to and fro without a pause."""

    closed_loop, obs_steps, horizon, execute_steps = False, 1, 16, 4

    def __init__(self, spec: Spec) -> None:
        self.spec = Spec({"state": spec.observation["state"]}, spec.action, spec.rate_hz)
        self._direction = 1.0

    def seed(self, seed: int) -> None:
        """Nothing is random."""

    def plan(self, history: dict[str, np.ndarray]) -> np.ndarray:
        """Return a chunk (1, H, A) onwards at constant speed, back where the range ends."""
        here = history["state"][:, -1]
        if abs(here[0, 0]) > 0.5:
            self._direction = -np.sign(here[0, 0])
        steps = self._direction * _SPEED / self.spec.rate_hz * np.arange(1, self.horizon + 1)
        return (here[:, None] + steps[None, :, None] * np.ones(3)).astype(np.float32)

    def refine(self, history: dict[str, np.ndarray], actions: np.ndarray) -> np.ndarray:
        """Return the actions as they are."""
        return actions


class Stage:
    """A deployment in this process whose operator is the page; a context manager."""

    def __init__(self, port: int = 8470, recorder: Any = None, **settings: Any) -> None:
        self.robot = TimedRobot(camera=True)
        transport = InProcessTransport(quiet=True)
        server = PolicyServer(Sweep(self.robot.spec), transport.policy)
        transport.on_observation = server.serve_once
        self.console = Console(self.robot.spec, ConsoleConfig(port=port), token="")
        config = ExecutorConfig(interpolation="linear", execute_steps=4, late_steps=8, blend_seconds=0.0, **settings)
        self.executor = Executor(self.robot, transport.executor, config, teleop=[self.console], recorder=recorder)
        self.console.watch(ExecutorFeed(self.executor, transport))
        self._stop = threading.Event()
        self._loop = threading.Thread(target=self.executor.run, args=(self._stop,), name="executor", daemon=True)

    @property
    def mode(self) -> Mode:
        """Mode of the arbiter."""
        return self.executor.arbiter.mode

    def __enter__(self) -> Stage:
        self.console.connect()
        self.executor.connect()
        self._loop.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._loop.join(10.0)
        self.executor.shut_down()
        self.console.disconnect()

    def drive(self) -> None:
        """Bring the deployment to where the policy drives, from wherever it is."""
        desk = self.console.desk
        wait_until(lambda: desk.holder is None, "letting go of control")
        wishes = {Mode.STOPPED: OperatorEvent.RESET, Mode.IDLE: OperatorEvent.ENABLE}

        def driven() -> bool:
            if self.mode not in DRIVEN:
                desk.ask(wishes.get(self.mode, OperatorEvent.HAND_BACK), 0)
                time.sleep(0.05)
            return self.mode is Mode.AUTO

        wait_until(driven, "the policy driving")
        time.sleep(0.1)


def open_page(browser: Any, stage: Stage, width: int = 900, height: int = 640) -> Any:
    """Return a tab with the console, once its buttons are there."""
    page = browser.new_page(viewport={"width": width, "height": height}, reduced_motion="reduce")
    page.set_default_timeout(1e3 * PATIENCE)
    page.goto(stage.console.address)
    button(page, "STOP").wait_for()
    return page


def button(page: Any, name: str) -> Any:
    """Return the page's button called ``name``."""
    return page.get_by_role("button", name=name, exact=True)


def press(page: Any, name: str) -> float:
    """Press the mouse on a button without letting go; return the monotonic time (s) just before."""
    wanted = button(page, name)
    wanted.scroll_into_view_if_needed()
    box = wanted.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    start = time.monotonic()
    page.mouse.down()
    return start


def stop_clicks(page: Any, stage: Stage, count: int) -> list[float]:
    """Press the page's emergency stop ``count`` times; return the seconds from each until no command moves any more."""
    found = []
    for _ in range(count):
        stage.drive()
        start = press(page, "STOP")
        wait_until(lambda: stage.mode is Mode.STOPPED, "the stop")
        page.mouse.up()
        time.sleep(0.1)
        found.append(stage.robot.still_since(start) - start)
    return found


def takeovers(page: Any, stage: Stage, count: int) -> tuple[list[float], list[float]]:
    """Hold the drive button ``count`` times; return the seconds until the human drives, and from release to HOLD."""
    taken, lost = [], []
    for _ in range(count):
        stage.drive()
        start = press(page, "HOLD TO DRIVE")
        wait_until(lambda: stage.mode is Mode.HUMAN, "the takeover")
        taken.append(stage.executor.arbiter.changes[-1][0] - start)
        time.sleep(0.3)
        end = time.monotonic()
        page.mouse.up()
        wait_until(lambda: stage.mode is Mode.HOLD, "the hold")
        lost.append(stage.executor.arbiter.changes[-1][0] - end)
    return taken, lost


def figures(seconds: list[float], name: str) -> dict[str, float]:
    """Return median, 99th percentile and largest of some times, in ms."""
    percentiles = {"p50": 50, "p99": 99, "max": 100}
    return {f"{name}_{key}_ms": 1e3 * float(np.percentile(seconds, percent)) for key, percent in percentiles.items()}


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50, help="clicks of each kind")
    count = parser.parse_args().count
    with Stage() as stage, headless_browser() as browser:
        page = open_page(browser, stage)
        stops = stop_clicks(page, stage, count)
        taken, lost = takeovers(page, stage, count)
        lateness = stage.executor.lateness.summary("lateness")
    report(
        "console_latency",
        seeds=[],
        budget={"clicks": count, "tick_rate_hz": 100},
        metrics=figures(stops, "stop") | figures(taken, "takeover") | figures(lost, "release_to_hold") | lateness,
        targets=TARGETS,
        notes="Headless Chromium with software rendering; page, executor and policy on the same machine. Stop: until "
        "the first command from which on none moves. Release: the last heartbeat may be 50 ms older than it.",
    )


if __name__ == "__main__":
    main()
