"""Progress: rate and time left, plain lines without a terminal, nesting with one."""

import io
import re

import pytest
from rich.console import Console

from robot_rl.train import progress as module
from robot_rl.train.progress import Activity, duration, progress, say


class Clock:
    def __init__(self):
        self.time = 100.0

    def __call__(self):
        return self.time


def test_rate_and_time_left_follow_the_last_seconds():
    clock = Clock()
    activity = Activity("train", 1000, "step", 0, clock)
    assert activity.remaining is None
    for _ in range(100):
        clock.time += 1.0
        activity.advance(1)
    for _ in range(30):
        clock.time += 1.0
        activity.advance(10)
    assert activity.rate == pytest.approx(10, rel=0.1), "the slow beginning is forgotten"
    assert activity.remaining == pytest.approx(60, rel=0.1)


def test_a_resumed_activity_does_not_count_earlier_work_as_speed():
    clock = Clock()
    activity = Activity("train", 100, "step", 90, clock)
    clock.time += 10.0
    activity.advance(5)
    assert activity.rate == pytest.approx(0.5)
    assert "5/10" in activity.summary() or "95/100" in activity.summary()
    assert "2.0 s/step" in activity.summary()


def test_plain_lines_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(module, "LINE_INTERVAL", 0.0)
    monkeypatch.setattr(module, "_DRAW_INTERVAL", 0.0)
    with progress("train", 4) as activity:
        for step in range(4):
            activity.advance(loss=0.1 * step)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert "train:  50% 2/4 steps" in lines[1]
    assert "left, loss 0.1" in lines[1]
    assert lines[-1].startswith("train: 4/4 steps in ")


def test_an_interrupted_activity_says_where_it_stopped(capsys):
    def work():
        with progress("train", 4) as activity:
            activity.advance()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert capsys.readouterr().err.startswith("stopped train:  25% 1/4 steps")


def test_bars_nest_on_a_terminal(monkeypatch):
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=120)
    monkeypatch.setattr(module._Screen, "console", property(lambda self: console))
    with progress("fine-tune", 2, "update") as outer:
        outer.advance()
        with progress("evaluate", 3, "episode") as inner:
            inner.advance(3, success=1.0)
            say("above the bars")
        outer.advance()
    text = output.getvalue()
    assert "above the bars" in text
    assert "evaluate: 3/3 episodes" in text
    assert "fine-tune: 2/2 updates" in text
    assert module._screen.live is None


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0s"), (59.4, "59s"), (200, "3:20"), (3720, "1:02:00")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_an_activity_measured_in_time_has_no_rate():
    clock = Clock()
    activity = Activity("deploy", 20, "s", 0, clock)
    clock.time += 5.0
    activity.advance(5)
    assert activity.line() == "deploy:  25% 5/20 s, 15s left"


def test_a_narrow_terminal_cuts_the_values_and_nothing_else(monkeypatch):
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=72)
    monkeypatch.setattr(module._Screen, "console", property(lambda self: console))
    with progress("deploy", 8, "s") as activity:
        activity.advance(4, mode="STOPPED (emergency stop)", rate="100 Hz", late="0.14 ms", safety="1200")
        module._screen.live.refresh()
    shown = [line for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "\n", output.getvalue()).splitlines() if line.strip()]
    text = " ".join(shown)
    assert "deploy" in shown
    assert " 50%" in text
    assert "STOPPED (emergency" in text
    assert "1200" not in text.partition("✓")[0]
