"""Everything executed is recorded with who acted and why, and the control loop never waits for the disk."""

import errno
import json
import threading
import time

import numpy as np
from deployment_rig import Rig

from hardware.control.arbiter import REASONS, Mode
from hardware.control.executor import Executor
from hardware.recording import recorder as module
from hardware.recording.recorder import ACTOR_CODES, ExecutedStep, Recorder
from hardware.robots.fake import FakeRobot
from hardware.safety.flags import SafetyFlag
from robot_rl.core.teleop import OperatorEvent


def executed(spec, **changes):
    zeros = np.zeros(spec.action.shape, np.float32)
    step = {
        "observation": {"state": zeros},
        "action": zeros,
        "policy_action": zeros,
        "human_action": zeros,
        "writer": "policy",
        "mode": Mode.AUTO,
        "reason": "enabled",
        "safety_flags": 0,
        "stamp": 1.0,
    }
    return ExecutedStep(**{**step, **changes})


def test_a_takeover_and_a_stop_are_in_the_record_with_actor_actions_and_reason(tmp_path):
    from robot_rl.data.dataset import open_dataset

    rig = Rig()
    recorder = Recorder(tmp_path / "run", rig.plain.spec, task="test")
    rig.executor = Executor(rig.robot, rig.transport.executor, rig.executor.config, recorder=recorder, clock=rig.clock)
    rig.executor.connect()
    rig.start()
    rig.tick(count=50)
    rig.steering = np.array([1.0, 0.0, 0.0])
    rig.tick(count=50)
    rig.steering = np.zeros(3)
    rig.tick(OperatorEvent.HAND_BACK, count=50)
    rig.tick(OperatorEvent.SUCCESS)
    rig.tick(OperatorEvent.EMERGENCY_STOP, count=30)
    commands = np.array(rig.plain.commands)
    recorder.close()
    assert recorder.to_json()["episodes"] == 2
    assert recorder.dropped == 0

    dataset = open_dataset(tmp_path / "run")
    frames = dataset.load()
    extras = frames.extras
    first = frames.episode(0)
    actor = extras["actor"][first].ravel()
    assert list(dict.fromkeys(actor)) == [ACTOR_CODES["policy"], ACTOR_CODES["human"]]
    human = actor == ACTOR_CODES["human"]
    assert (extras["intervention"][first].ravel().astype(bool) == human).all()
    assert extras["success"][first].ravel()[-1]
    # The executed action of each step is the last command sent in it; the policy's own is kept beside it.
    sent = commands[rig.executor.ticks_per_step - 1 :: rig.executor.ticks_per_step]
    np.testing.assert_array_equal(frames.action[first], sent[: len(actor)].astype(np.float32))
    assert np.abs(extras["policy_action"][first][human] - frames.action[first][human]).max() > 0.01
    last = frames.episode(1)
    assert (extras["safety_flags"][last].ravel()[-1] & SafetyFlag.EMERGENCY_STOP) > 0
    assert REASONS[int(extras["reason"][last].ravel()[-1])] == "emergency_stop"
    labels = json.loads((tmp_path / "run" / "meta" / "labels.json").read_text())
    assert labels["actor"] == ACTOR_CODES
    assert labels["safety_flags"]["emergency_stop"] == SafetyFlag.EMERGENCY_STOP


def test_a_slow_disk_drops_steps_and_says_so(tmp_path, caplog):
    spec = FakeRobot().spec
    recorder = Recorder(tmp_path / "slow", spec, depth=3)
    gate = threading.Event()
    write = recorder._write
    recorder._write = lambda step: (gate.wait(), write(step))
    for _ in range(20):
        recorder.add(executed(spec))
    assert recorder.dropped >= 16
    gate.set()
    recorder.close()
    assert "dropped" in caplog.text
    assert recorder.written + recorder.dropped == 20


def test_a_failing_disk_ends_the_recording_and_not_the_run(tmp_path):
    spec = FakeRobot().spec
    recorder = Recorder(tmp_path / "full", spec)

    def fail(step, pre_intervention):
        raise OSError("no space left")

    recorder._write = fail
    for _ in range(5):
        recorder.add(executed(spec))
    recorder.close()
    assert "no space left" in recorder.to_json()["failure"]


def test_a_disk_that_cannot_be_asked_ends_the_recording_and_says_so(tmp_path, monkeypatch):
    spec = FakeRobot().spec
    recorder = Recorder(tmp_path / "run", spec)

    def broken(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(module.shutil, "disk_usage", broken)
    recorder._next_look = 0.0
    recorder.add(executed(spec))
    recorder.close()
    assert "Input/output error" in recorder.to_json()["failure"]
    assert not recorder.status()["active"]


def test_a_disk_that_hangs_does_not_hold_up_the_end(tmp_path, caplog):
    spec = FakeRobot().spec
    recorder = Recorder(tmp_path / "run", spec, depth=1)
    gate = threading.Event()
    recorder._next = lambda: (gate.wait(), Recorder._next(recorder))[1]
    try:
        recorder.add(executed(spec))
        recorder.close(timeout=0.01)
        assert "did not finish" in caplog.text
    finally:
        gate.set()
        recorder.close()


def test_what_a_crash_would_lose_is_on_the_disk_before_the_end(tmp_path, monkeypatch):
    from robot_rl.data.dataset import open_dataset

    spec = FakeRobot().spec
    monkeypatch.setattr(module, "LONGEST_EPISODE_SECONDS", 40 / spec.rate_hz)
    recorder = Recorder(tmp_path / "run", spec)
    window = round(spec.rate_hz)
    for _ in range(100 + window):
        recorder.add(executed(spec))
    recorder.note_run({"ticks": 3})
    while not recorder._queue.empty():
        time.sleep(0.001)
    frames = open_dataset(tmp_path / "run").load()
    np.testing.assert_array_equal(frames.episode_lengths, [40, 40])
    assert json.loads((tmp_path / "run" / "meta" / "labels.json").read_text())["actor"] == ACTOR_CODES
    recorder.discard()
    recorder.add(executed(spec))
    recorder.end_episode(True)
    recorder.close()
    assert (recorder.episodes, recorder.written) == (3, 81)
    assert json.loads((tmp_path / "run" / "meta" / "runs.jsonl").read_text()) == {"ticks": 3}


def test_a_second_run_continues_the_recording(tmp_path):
    from robot_rl.data.dataset import open_dataset

    spec = FakeRobot().spec
    for _ in range(2):
        recorder = Recorder(tmp_path / "twice", spec)
        for _ in range(4):
            recorder.add(executed(spec))
        recorder.close()
    assert open_dataset(tmp_path / "twice").num_episodes == 2


def test_the_operator_stops_starts_and_discards_the_recording(tmp_path):
    from robot_rl.data.dataset import open_dataset

    rig = Rig()
    recorder = Recorder(tmp_path / "run", rig.plain.spec)
    rig.executor = Executor(rig.robot, rig.transport.executor, rig.executor.config, recorder=recorder, clock=rig.clock)
    rig.executor.connect()
    rig.start()
    rig.tick(count=20)  # four steps, which are not wanted
    rig.tick(OperatorEvent.RECORD_DISCARD, count=20)
    assert rig.executor.status(0.0).recording["active"]
    rig.tick(OperatorEvent.RECORD_STOP, count=20)
    assert not rig.executor.status(0.0).recording["active"]
    rig.tick(OperatorEvent.RECORD_START, count=10)
    rig.tick(OperatorEvent.FAILURE)
    recorder.close()
    known = recorder.status()
    assert known["free_bytes"] > 0
    dataset = open_dataset(tmp_path / "run")
    lengths = [dataset.load().episode(k) for k in range(dataset.num_episodes)]
    lengths = [one.stop - one.start for one in lengths]
    assert (known["episodes"], known["steps"]) == (2, sum(lengths))
    assert lengths == [4, 2], "neither what was discarded nor what was executed in between"


def test_what_came_before_a_takeover_is_marked_and_a_missing_plan_is_not_taken_for_one(tmp_path):
    from robot_rl.data.dataset import open_dataset

    spec = FakeRobot(3).spec
    recorder = Recorder(tmp_path / "run", spec)
    writers = ["policy"] * 50 + ["none"] * 2 + ["human"] * 5 + ["policy"] * 30 + ["human"] * 3 + ["policy"] * 25
    for writer in writers:
        recorder.add(executed(spec, writer=writer, planned=writer != "none"))
    recorder.end_episode(True)
    recorder.add(executed(spec))
    recorder.close()
    frames = open_dataset(tmp_path / "run").load()
    marked = frames.extras["pre_intervention"].ravel().astype(bool)
    expected = np.zeros(len(writers) + 1, bool)
    window = round(spec.rate_hz)
    expected[52 - window : 50] = True  # a second before the first take-over, but not the two steps of holding
    expected[87 - window : 87] = True
    np.testing.assert_array_equal(marked, expected)
    planned = frames.extras["policy_planned"].ravel().astype(bool)
    np.testing.assert_array_equal(planned, [writer != "none" for writer in writers] + [True])
    np.testing.assert_array_equal(frames.episode_lengths, [len(writers), 1])


def test_the_figures_of_each_run_are_kept_with_what_was_recorded(tmp_path):
    for _ in range(2):
        rig = Rig()
        recorder = Recorder(tmp_path / "data", rig.plain.spec)
        config = rig.executor.config
        rig.executor = Executor(rig.robot, rig.transport.executor, config, recorder=recorder, clock=rig.clock)
        rig.executor.connect()
        rig.start()
        rig.tick(count=30)
        rig.executor.shut_down()
        recorder.close()
    runs = [json.loads(line) for line in (tmp_path / "data" / "meta" / "runs.jsonl").read_text().splitlines()]
    assert len(runs) == 2
    for run in runs:
        assert {"p50_ms", "p99_ms", "max_ms"} <= set(run["lateness"])
        assert run["missed_ticks"] == 0
        assert run["final_stop_confirmed"] is True
        assert run["chunks"]["chunks_accepted"] > 0
