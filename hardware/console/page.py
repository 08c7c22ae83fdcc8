"""The page: builds what tabs see on a viser server, passes what they do to the desk, and shows what the feed says."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np

from hardware.console import view
from hardware.console.desk import Desk
from hardware.console.feed import Feed
from hardware.console.scene import Scene
from hardware.console.steering import Handle
from hardware.control.arbiter import Mode
from hardware.transport import ExecutorStatus
from robot_rl.core.robot import StampedObservation
from robot_rl.core.spec import Spec
from robot_rl.core.teleop import OperatorEvent

logger = logging.getLogger(__name__)

HEARTBEAT_HZ = 20.0
"""How often a held button says so."""
STOP_LABEL, HOLD_LABEL = "STOP", "HOLD TO DRIVE"
_STOP_STYLE = (
    "<style>div:has(> .robot-rl-stop) + div button {height: 4.5em !important; font-size: 1.7em; font-weight: 800}"
    "</style><span class='robot-rl-stop'></span>"
)
_JOG_KEYS = (("i", "k"), ("j", "l"), ("u", "o"))
_EVENT_KEYS: tuple[tuple[Any, str, OperatorEvent], ...] = (
    ("space", "Emergency stop", OperatorEvent.EMERGENCY_STOP),
    ("h", "Hold still", OperatorEvent.HOLD),
    ("r", "Reset", OperatorEvent.RESET),
    ("n", "Enable", OperatorEvent.ENABLE),
    ("b", "Hand back", OperatorEvent.HAND_BACK),
    ("y", "The episode succeeded", OperatorEvent.SUCCESS),
    ("x", "The episode failed", OperatorEvent.FAILURE),
)
_AT_REST = (Mode.HOLD.value, Mode.HUMAN.value)
_IMAGE_SECONDS = 0.2
_WIDEST_IMAGE = 320
_HELP = (
    "**Keys** (click the scene first): **space** stop · **t** (keep it down) drive · **i/k j/l u/o** jog the first "
    "three elements, with shift the next three · **n** enable · **b** hand back · **h** hold still · **r** reset · "
    "**y/x** succeeded/failed."
)


class Page:
    """One page for all tabs. What tabs do arrives in the server's thread; `refresh` is called by another."""

    def __init__(self, server: Any, desk: Desk, spec: Spec, handle: Handle | None) -> None:
        """Build the page.

        Args:
            server: a running ``viser.ViserServer``.
            desk: what tabs act on.
            spec: of the robot.
            handle: what dragging the end effector means, None where there is no handle.
        """
        self.server, self.desk, self.spec = server, desk, spec
        self._size = spec.action.size
        self._rates = np.array([view.element_unit(spec.action, k).endswith("/s") for k in range(self._size)])
        self._image_stamps: dict[str, float] = {}
        self._images_due = 0.0
        self._mode = ""
        gui = server.gui
        gui.configure_theme(control_width="large", show_logo=False, show_share_button=False)
        gui.main_panel.dock_right()
        gui.set_panel_label("robot_rl console")
        self._command_panel(gui)
        self._instrument_panel(gui)
        self._keys(gui)
        self.scene = Scene(server, spec.action, handle, self._drag)
        server.on_client_disconnect(self._left)

    # ---- building ----------------------------------------------------------------------------------------------------

    def _command_panel(self, gui: Any) -> None:
        self.banner = gui.add_html(view.banner(None, 0.0))
        gui.add_html(_STOP_STYLE)
        self.stop = self._event_button(gui, STOP_LABEL, OperatorEvent.EMERGENCY_STOP, "red")
        # The press stops, not the release; a click by keyboard has no press.
        self.stop.on_hold(self._asking(OperatorEvent.EMERGENCY_STOP), callback_hz=1.0)
        self.hold_button = gui.add_button(HOLD_LABEL, color="orange", hint="Takes over, and drives to the target")
        self.hold_button.on_hold(self._when(lambda tab: self.desk.hold(tab)), callback_hz=HEARTBEAT_HZ)
        self._event_button(gui, "Hold still", OperatorEvent.HOLD, "gray")
        self._event_button(gui, "Hand back to the policy", OperatorEvent.HAND_BACK, "teal")
        with gui.add_folder("After a stop: reset, then enable"):
            self._event_button(gui, "Reset", OperatorEvent.RESET, "gray")
            self._event_button(gui, "Enable", OperatorEvent.ENABLE, "teal")
        with gui.add_folder("Target"):
            self.sliders = [self._slider(gui, index) for index in range(self._size)]
        with gui.add_folder("Jog (hold)"):
            self.element = gui.add_dropdown("Element", self._names(), initial_value=self._names()[0])
            self.jog_speed = gui.add_slider("Speed", min=0.1, max=1.0, step=0.1, initial_value=0.5)
            for label, direction in (("+", 1.0), ("-", -1.0)):
                button = gui.add_button(label, color="orange")
                button.on_hold(self._when(self._jogging(direction)), callback_hz=HEARTBEAT_HZ)
        with gui.add_folder("Recording"):
            for label, event, colour in (
                ("Start", OperatorEvent.RECORD_START, "gray"),
                ("Stop and save", OperatorEvent.RECORD_STOP, "gray"),
                ("Discard this episode", OperatorEvent.RECORD_DISCARD, "gray"),
                ("Episode succeeded", OperatorEvent.SUCCESS, "green"),
                ("Episode failed", OperatorEvent.FAILURE, "gray"),
            ):
                self._event_button(gui, label, event, colour)
        gui.add_markdown(_HELP)

    def _instrument_panel(self, gui: Any) -> None:
        panel = gui.add_panel()
        panel.dock_left()
        panel.set_width(360)
        with panel.add_tab("Robot"):
            self.elements = gui.add_html(view.elements(self.spec.action, None))
            self.counters = gui.add_html(view.counters(None))
            self.loop = gui.add_html(view.loop(None))
            self.recording = gui.add_html(view.recording(None))
            blank = np.full((48, 64, 3), 200, np.uint8)
            names = [name for name, one in self.spec.observation.items() if one.is_image]
            self.cameras = {name: gui.add_image(blank, label=name, format="jpeg", jpeg_quality=70) for name in names}

    def _keys(self, gui: Any) -> None:
        for key, label, event in _EVENT_KEYS:
            gui.add_command(label, hotkey=key).on_trigger(self._asking(event))
        gui.add_command("Take over and drive (keep the key down)", hotkey="t").on_trigger(
            self._when(lambda tab: self.desk.hold(tab, key=True))
        )
        for index in range(min(self._size, 2 * len(_JOG_KEYS))):
            row, shifted = index % len(_JOG_KEYS), index >= len(_JOG_KEYS)
            for key, direction in zip(_JOG_KEYS[row], (1.0, -1.0), strict=True):
                label = f"Jog {view.element_name(self.spec.action, index)} {'+' if direction > 0 else '-'}"
                command = gui.add_command(label, hotkey=key, modifier="shift" if shifted else None)
                command.on_trigger(self._when(self._jogging(direction, index, key=True)))

    def _event_button(self, gui: Any, label: str, event: OperatorEvent, colour: str) -> Any:
        button = gui.add_button(label, color=colour)
        button.on_click(self._asking(event))
        return button

    def _names(self) -> list[str]:
        return [view.element_name(self.spec.action, index) for index in range(self._size)]

    def _slider(self, gui: Any, index: int) -> Any | None:
        """Return a slider for where an element shall go; None for one without an end, and for a rate."""
        low, high = (float(bound.ravel()[index]) for bound in self.spec.action.bounds())
        if self._rates[index] or not np.isfinite([low, high]).all() or high <= low:
            return None
        unit = view.element_unit(self.spec.action, index)
        label = f"{view.element_name(self.spec.action, index)} {f'({unit})' if unit else ''}".strip()
        step = 10.0 ** np.floor(np.log10((high - low) / 200))
        initial = float(np.clip(0.0, low, high))
        slider = gui.add_slider(label, min=low, max=high, step=float(step), initial_value=initial)

        @slider.on_update
        async def _(event: Any) -> None:
            if event.client_id is not None:  # None: it follows the robot
                self._answer(event, self._place_element(_tab(event), index, float(event.target.value)))

        return slider

    # ---- what tabs do ------------------------------------------------------------------------------------------------

    def _when(self, act: Callable[[int], str]) -> Callable[[Any], Coroutine[Any, Any, None]]:
        """Return a callback that acts for the tab; it runs in the server's own loop, so that no queue delays it."""

        async def callback(event: Any) -> None:
            self._answer(event, act(_tab(event)))

        return callback

    def _asking(self, asked: OperatorEvent) -> Callable[[Any], Coroutine[Any, Any, None]]:
        return self._when(lambda tab: self.desk.ask(asked, tab))

    def _jogging(self, direction: float, index: int | None = None, key: bool = False) -> Callable[[int], str]:
        def act(tab: int) -> str:
            element = self._names().index(self.element.value) if index is None else index
            return self.desk.jog(tab, element, direction * float(self.jog_speed.value), key)

        return act

    def _answer(self, event: Any, refusal: str) -> None:
        if refusal and event.client is not None:
            event.client.add_notification("Not done", refusal, color="yellow", auto_close_seconds=3.0)

    def _place_element(self, tab: int, index: int, value: float) -> str:
        target = self._present_target()
        if target is None:
            return "Where the robot is, is not known."
        target[index] = value
        return self._place(tab, target)

    def _drag(self, event: Any, position: np.ndarray, quaternion: np.ndarray, handle: Handle) -> None:
        target = self._present_target()
        if target is not None:
            self._answer(event, self._place(_tab(event), handle.action(position, quaternion, target)))

    def _place(self, tab: int, target: np.ndarray) -> str:
        if self._mode not in _AT_REST:
            return "A target can be set while the robot holds or is driven from here: hold to drive first."
        low, high = (bound.ravel() for bound in self.spec.action.bounds())
        return self.desk.place(tab, np.clip(target, low, high))

    def _present_target(self) -> np.ndarray | None:
        target = self.desk.target
        command = self.desk.command() if target is None else target
        return None if command is None else np.array(command, float)

    async def _left(self, client: Any) -> None:
        self.desk.leave(client.client_id + 1)

    # ---- what tabs see -----------------------------------------------------------------------------------------------

    def refresh(self, feed: Feed) -> None:
        """Show what is known now; called about ten times per second, and cheap while no tab is open."""
        status, age = feed.status()
        self._mode = "" if status is None or age > view.SILENCE else status.mode
        if self._mode not in _AT_REST:
            self.desk.follow()
        if status is not None and len(status.speed) == self._size:
            self.desk.speed = np.array(status.speed)
        if not self.server.get_clients():
            return
        _show(self.banner, view.banner(status, age, self.desk.holder))
        _show(self.elements, view.elements(self.spec.action, status))
        _show(self.counters, view.counters(status))
        _show(self.loop, view.loop(status))
        _show(self.recording, view.recording(status))
        self._follow(status)
        observation = feed.observation()
        if observation is not None and time.monotonic() >= self._images_due:
            self._images_due = time.monotonic() + _IMAGE_SECONDS
            self._show_cameras(observation)

    def _follow(self, status: ExecutorStatus | None) -> None:
        """Let sliders and handle show the target, or the robot where no target is set."""
        target = self._present_target()
        locked = self._mode not in _AT_REST
        for slider, value in zip(self.sliders, [] if target is None else target, strict=False):
            if slider is None:
                continue
            if slider.disabled != locked:
                slider.disabled = locked
            shown = round(round(float(value) / slider.step) * slider.step, 9)
            if abs(slider.value - shown) > 0.5 * slider.step:
                slider.value = float(np.clip(shown, slider.min, slider.max))
        measured = np.array(status.measured) if status is not None and len(status.measured) == self._size else None
        self.scene.show(measured, target)

    def _show_cameras(self, observation: StampedObservation) -> None:
        now = time.monotonic()
        for name, tile in self.cameras.items():
            label = view.camera_label(name, observation.age(now, name))
            if tile.label != label:
                tile.label = label
            stamp = observation.stamps.get(name, observation.stamp)
            if name in observation.values and self._image_stamps.get(name) != stamp:
                self._image_stamps[name] = stamp
                image = observation.values[name]
                stride = -(-image.shape[1] // _WIDEST_IMAGE)
                tile.image = np.ascontiguousarray(image[::stride, ::stride])


def _tab(event: Any) -> int:
    """Return the number of the tab that an event came from, as shown to people."""
    return int(event.client_id) + 1


def _show(element: Any, content: str) -> None:
    if element.content != content:
        element.content = content
