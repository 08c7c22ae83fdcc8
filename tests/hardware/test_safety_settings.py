"""Safety files, and the stages that they bring: speed of points, singular configurations, forces."""

from pathlib import Path

import numpy as np
import pytest
from deployment_rig import Rig, WanderingPolicy
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.control.executor import Executor, ExecutorConfig
from hardware.robots.fake import FakeRobot
from hardware.safety.chain import SafetyChain, Situation
from hardware.safety.flags import SafetyFlag, flag_names
from hardware.safety.forces import ForceLimit, ForceMonitor
from hardware.safety.settings import SafetySettings, WorkspaceSettings, load_safety, protection_from
from hardware.transport import InProcessTransport
from robot_rl.core.errors import ConfigError, UnknownNameError
from robot_rl.core.paths import data_file
from robot_rl.core.registry import make_env
from robot_rl.core.robot import Limits, StampedObservation, StopKind
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.core.teleop import OperatorEvent

DT = 0.01
HOME = np.array([0.0, 0.1868, 0.0, -2.3462, 0.0, 2.5330, 0.7854])
PANDA = Limits(
    np.array([-2.8, -1.7, -2.8, -3.0, -2.8, 0.0, -2.8]),
    np.array([2.8, 1.7, 2.8, -0.1, 2.8, 3.7, 2.8]),
    np.full(7, 2.0),
    np.full(7, 15.0),
)


def situation(**changes):
    observation = changes.pop("observation", StampedObservation({}, 0, 0.0))
    return Situation(0.0, observation, **{"writer": "policy", **changes})


class Joints(FakeRobot):
    """A Panda that is commanded in joints and measures nothing but them."""

    def __init__(self):
        super().__init__(7, limits=PANDA)
        self.spec = Spec(self.spec.observation, ArraySpec((7,), unit="rad"), 20.0)


def write(tmp_path, text):
    path = tmp_path / "safety.yaml"
    path.write_text(text)
    return path


def panda(tmp_path, extra=""):
    model = "model: {file: 'assets:franka_panda/panda.xml', tool: tool, points: [link4, link6],\n"
    model += "  joints: [joint1, joint2, joint3, joint4, joint5, joint6, joint7]}\n"
    protection = protection_from(write(tmp_path, model + extra), Joints(), DT)
    chain = SafetyChain(protection.limits, DT, guards=protection.guards)
    chain.anchor(HOME)
    return chain


# ---- the file --------------------------------------------------------------------------------------------------------


def test_the_examples_fit_their_robots():
    env = make_env("peg_insert", 1, threads=1)
    try:
        from robot_rl.core.bridge import EnvRobot

        robot = EnvRobot(env, lock_step=True)
        protection = protection_from(data_file("launch", "params", "safety_peg.yaml"), robot, DT)
        hold = env.hold_action()[0] if env.reset(0) else None
        assert protection.guards.workspace.excess(hold[None]) < 0
        assert protection.guards.speed is None
        np.testing.assert_array_equal(protection.forces._elements[0], [15, 16, 17])
        assert robot.spec.observation["state"].names[15] == "force_x"
        low, high = env.spec.action.bounds()
        assert (protection.guards.workspace.low >= low[:3] - 0.01).all(), "the box is that of the task"
        assert (protection.guards.workspace.high <= high[:3] + 0.01).all()
    finally:
        env.close()
    joints = protection_from(data_file("launch", "params", "safety_panda.yaml"), Joints(), DT)
    assert joints.guards.clearance.distance(HOME) > 0.05
    assert joints.guards.singularity.condition(HOME) < 17
    assert (joints.limits.jerk == 600.0).all()


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("worksapce: {low: [0, 0, 0]}", UnknownNameError, "Did you mean 'workspace'"),
        ("workspace: {lower: [0, 0, 0]}", UnknownNameError, "key in .*workspace 'lower'"),
        ("profile: manual", UnknownNameError, "Did you mean 'manual_reduced'"),
        ("forces: [{key: state, limit: much}]", ConfigError, "limit: expected float, got 'much'"),
        ("forces: [{key: state}]", ConfigError, "'limit' is missing"),
        ("forces: [{key: wrench, limit: 1}]", UnknownNameError, "Unknown observation 'wrench'"),
        ("forces: [{key: state, limit: 1, names: [fx]}]", UnknownNameError, "element of 'state' 'fx'"),
        ("forces: [{key: state, limit: -1}]", ConfigError, "positive limit"),
        ("singularity: {slow: 5}", ConfigError, "needs a 'model'"),
        ("workspace: {low: [0, 0], high: [1, 1]}", ConfigError, "three numbers"),
        ("workspace: {low: [0, 0, 0]}", ConfigError, "both corners"),
        ("jerk: [1, 2]", ConfigError, "2 numbers; the command has 3"),
        ("speed: 0.0", ConfigError, "positive"),
        ("[1, 2]", ConfigError, "expected a mapping"),
        ("a: [", ConfigError, "cannot be read"),
        ("model: {file: none.xml, joints: [a, b, c], tool: t}", ConfigError, "none.xml' does not exist"),
        ("model: {file: none.xml, joints: [a], tool: t}", ConfigError, "1 joints, and the robot's command 3"),
    ],
)
def test_mistakes_in_the_file_are_one_line_that_names_them(tmp_path, text, error, message):
    with pytest.raises(error, match=message) as caught:
        protection_from(write(tmp_path, text), FakeRobot(), DT)
    assert "\n" not in str(caught.value)


def test_mistakes_in_names_of_the_model_are_named(tmp_path):
    with pytest.raises(UnknownNameError, match="Unknown body or obstacle 'hnad'"):
        panda(tmp_path, "clearance: {pairs: [[hnad, link0]]}")
    with pytest.raises(ConfigError, match="no pair of geoms can touch"):
        panda(tmp_path, "clearance: {}")
    with pytest.raises(ConfigError, match="1 <= slow < stop"):
        panda(tmp_path, "singularity: {slow: 40}")


def test_without_a_model_the_command_must_be_a_position():
    with pytest.raises(ConfigError, match="position in metres; this robot's command is in 'rad'"):
        SafetySettings(profile="manual_reduced").protect(Joints(), DT)


def test_own_limits_are_tightened_and_never_widened():
    found = SafetySettings(velocity=(0.5,), acceleration=(99.0,), jerk=(7.0,)).protect(FakeRobot(), DT).limits
    assert (found.velocity == 0.5).all()
    assert (found.acceleration == 10.0).all()
    assert (found.jerk == 7.0).all()


def test_an_empty_file_changes_nothing(tmp_path):
    robot = FakeRobot()
    assert load_safety(write(tmp_path, "")) == SafetySettings()
    assert protection_from(write(tmp_path, ""), robot, DT).limits is robot.limits


# ---- speed -----------------------------------------------------------------------------------------------------------


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), jerky=st.booleans())
def test_in_the_reduced_profile_no_point_is_faster_than_250_mm_per_second(tmp_path_factory, seed, jerky):
    extra = "profile: manual_reduced\n" + ("jerk: 500.0\n" if jerky else "")
    chain, rng = panda(tmp_path_factory.mktemp("safety"), extra), np.random.default_rng(seed)
    model, before = chain.guards.speed._positions.__self__, chain.command
    step, change = np.zeros(7), np.zeros(7)
    for k in range(150):
        if k % 30 == 0:
            target = rng.uniform(PANDA.low, PANDA.high)
        command = chain.filter(None if 100 < k < 110 else target, situation()).command
        places = model.positions(np.stack([before, command]))
        assert np.linalg.norm(places[1] - places[0], axis=-1).max() <= 0.25 * DT * (1 + 1e-6)
        assert (np.abs(command - before - step) <= PANDA.acceleration * DT**2).all()
        if jerky:
            assert (np.abs(command - before - step - change) <= 500 * DT**3).all()
        before, step, change = command, command - before, command - before - step
    assert chain.counts["speed_limited"] > 20
    assert chain.counts["post_check_failed"] == chain.counts["exception"] == 0


def test_a_slow_profile_still_gets_there():
    robot = FakeRobot()
    protection = SafetySettings(speed=0.1, workspace=WorkspaceSettings((-1,) * 3, (0.3,) * 3)).protect(robot, DT)
    chain = SafetyChain(protection.limits, DT, guards=protection.guards)
    chain.anchor(np.zeros(3))
    commands = np.array([chain.filter(np.array([0.5, 0.1, 0.0]), situation()).command for _ in range(450)])
    speeds = np.linalg.norm(np.diff(commands, axis=0), axis=1) / DT
    assert speeds.max() <= 0.1 + 1e-9
    assert np.median(speeds[20:250]) > 0.095, "it is not slowed more than needed"
    np.testing.assert_allclose(commands[-1], [0.3, 0.1, 0.0], atol=1e-3)


def test_the_reduced_profile_does_not_leave_elbows_out_in_silence(tmp_path, caplog):
    joints = "[joint1, joint2, joint3, joint4, joint5, joint6, joint7]"
    model = f"model: {{file: 'assets:franka_panda/panda.xml', tool: tool, joints: {joints}}}\n"
    reduced = "profile: manual_reduced\n"
    with pytest.raises(ConfigError, match=r"bounds the speed of the elbows too, and the model names none.*'points'"):
        protection_from(write(tmp_path, reduced + model), Joints(), DT)
    assert protection_from(write(tmp_path, "speed: 0.2\n" + model), Joints(), DT).guards.speed.limit == 0.2
    named = protection_from(
        write(tmp_path, reduced + model.replace("tool: tool", "tool: tool, points: [link4]")), Joints(), DT
    )
    assert named.guards.speed._positions(HOME[None]).shape == (1, 2, 3), "the tool and the elbow"
    assert not caplog.text
    assert protection_from(write(tmp_path, reduced), FakeRobot(), DT).guards.speed.limit == 0.25
    assert caplog.text.count("'manual_reduced' WITHOUT A MODEL bounds the tool's speed alone") == 1


# ---- singular configurations -----------------------------------------------------------------------------------------


def test_the_way_to_a_singular_configuration_slows_down_and_ends_before_it(tmp_path):
    chain = panda(tmp_path, "singularity: {}")
    stretched = HOME.copy()
    stretched[3] = -0.5  # the elbow almost straight
    measure = chain.guards.singularity.condition
    conditions, speeds = [], []
    for _ in range(600):
        before = chain.command[3]
        chain.filter(stretched, situation())
        conditions.append(measure(chain.command))
        speeds.append((chain.command[3] - before) / DT)
    conditions, speeds = np.array(conditions), np.array(speeds)
    assert 28.0 < conditions[-1] <= 30.0
    assert conditions.max() <= 30.0
    free = speeds[conditions < 16].max()
    assert free == pytest.approx(2.0, rel=1e-6)
    assert speeds[conditions > 25].max() < 0.5 * free
    assert chain.counts["singularity_limited"] > 10
    chain.counts.clear()
    for _ in range(150):  # away from it nothing is slowed
        chain.filter(HOME, situation())
    np.testing.assert_array_equal(chain.command, HOME)
    assert not chain.counts["singularity_limited"]


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_no_command_is_more_singular_than_the_stop_or_than_it_was(tmp_path_factory, seed):
    chain, rng = panda(tmp_path_factory.mktemp("safety"), "singularity: {}"), np.random.default_rng(seed)
    measure = chain.guards.singularity.condition
    for k in range(200):
        if k % 40 == 0:
            target = rng.uniform(PANDA.low, PANDA.high)
        command = chain.filter(target, situation()).command
        assert measure(command) <= 30.0 + 1e-9
    assert chain.counts["post_check_failed"] == chain.counts["exception"] == 0


# ---- forces ----------------------------------------------------------------------------------------------------------

WRENCH = Spec(
    {"wrench": ArraySpec((6,), names=("fx", "fy", "fz", "tx", "ty", "tz"), unit="N,N,N,Nm,Nm,Nm")},
    ArraySpec((3,), unit="m"),
    20.0,
)


def wrench(*values):
    return {"wrench": np.array([*values, *[0.0] * (6 - len(values))], np.float32)}


def test_a_force_must_last_for_its_dwell():
    monitor = ForceMonitor([ForceLimit("wrench", 10.0, ("fx", "fy", "fz"), dwell=0.03)], WRENCH, DT)
    assert [monitor.exceeded(wrench(0, -12)) for _ in range(2)] == [False, False]
    assert not monitor.exceeded(wrench(0, 9))
    assert [monitor.exceeded(wrench(0, -12)) for _ in range(3)] == [False, False, True]
    assert not any(monitor.exceeded(wrench(0, 0, 0, 99)) for _ in range(9)), "torques are not named"


def test_after_a_stop_the_robot_may_be_led_away_but_not_pressed_harder(caplog):
    monitor = ForceMonitor([ForceLimit("wrench", 10.0, ("fx", "fy"), norm=True)], WRENCH, DT)
    assert not monitor.exceeded(wrench(7, 7))
    assert monitor.exceeded(wrench(9, 9))
    assert "'wrench' fx fy is 12.73, above its limit of 10" in caplog.text
    assert not any(monitor.exceeded(wrench(9, 9)) for _ in range(20))
    assert monitor.exceeded(wrench(11, 11))
    assert not monitor.exceeded(wrench(1, 1))
    assert monitor.exceeded(wrench(8, 8))


class Pressed(FakeRobot):
    """Feels what it is told, as its second observation."""

    def __init__(self, **options):
        super().__init__(**options)
        self.spec = Spec({**self.spec.observation, **WRENCH.observation}, self.spec.action, self.spec.rate_hz)
        self.force = 0.0

    def observe(self):
        found = super().observe()
        found.values |= wrench(self.force)
        return found


def rig_with(protect, **config):
    rig = Rig(WanderingPolicy(FakeRobot().spec))
    robot = rig.robot = rig.plain = Pressed(clock=rig.clock)
    settings_ = ExecutorConfig(execute_steps=4, blend_seconds=0.0, **config)
    rig.executor = Executor(
        robot, rig.transport.executor, settings_, protection=protect.protect(robot, DT), clock=rig.clock
    )
    rig.executor.connect()
    return rig.start()


def test_a_force_latches_a_controlled_stop_and_reset_alone_moves_nothing(caplog):
    rig = rig_with(SafetySettings(forces=(ForceLimit("wrench", 10.0, dwell=0.02),)))
    rig.tick(count=20)
    assert rig.mode == "auto"
    rig.robot.force = 12.0
    rig.tick()
    verdict = rig.tick()
    assert "force_exceeded" in flag_names(verdict.flags)
    assert (rig.mode, rig.reason) == ("stopped", "force_exceeded")
    assert "force_exceeded" in caplog.text
    sizes = rig.moved(40)
    assert (np.diff(sizes) <= 1e-12).all()
    assert sizes[-1] == 0.0
    rig.tick(OperatorEvent.RESET)
    assert rig.mode == "idle"
    assert not rig.moved(40).any()
    rig.tick(OperatorEvent.ENABLE)
    rig.tick(count=20)
    rig.steering = np.array([1.0, 0.0, 0.0])
    rig.tick(count=30)
    assert rig.mode == "human", "the operator may lead it away although it still presses"
    rig.robot.force = 20.0
    rig.tick(count=2)
    assert (rig.mode, rig.reason) == ("stopped", "force_exceeded")


# ---- kinds of stop ---------------------------------------------------------------------------------------------------


def test_drives_go_off_at_an_emergency_stop_only_where_that_is_asked_for():
    for kind in ("controlled", "hold"):
        rig = rig_with(SafetySettings(), stop_kind=kind)
        rig.tick(OperatorEvent.EMERGENCY_STOP)
        assert rig.robot.stops == []
        rig.executor.shut_down()
        assert rig.robot.stops[0] is StopKind(kind)
    rig = rig_with(SafetySettings(), stop_kind="drives_off")
    rig.tick(count=10)
    rig.tick(OperatorEvent.EMERGENCY_STOP)
    assert rig.robot.stops == [StopKind.DRIVES_OFF]
    sent = len(rig.robot.commands)
    rig.tick(count=20)
    assert len(rig.robot.commands) == sent, "a robot without power is sent nothing"
    assert rig.robot.stops == [StopKind.DRIVES_OFF]
    rig.robot._position = rig.robot._position - 0.05  # it sags
    rig.tick(OperatorEvent.RESET)
    assert rig.mode == "idle"
    np.testing.assert_array_equal(rig.executor.safety.command, rig.robot._position)
    rig.tick(count=5)
    assert len(rig.robot.commands) > sent
    assert not rig.moved(20).any()


def test_a_kind_of_stop_that_does_not_exist_is_refused():
    with pytest.raises(UnknownNameError, match="Did you mean 'drives_off'"):
        Executor(FakeRobot(), InProcessTransport(quiet=True).executor, ExecutorConfig(stop_kind="drives-off"))


def test_the_new_flags_fit_the_recordings_column():
    assert max(SafetyFlag) < 2**31


# ---- the ways there --------------------------------------------------------------------------------------------------


def test_the_page_shows_a_file_that_can_be_read(tmp_path):
    page = (Path(__file__).resolve().parents[2] / "docs" / "deployment.md").read_text()
    text = page.split("```yaml\n", 1)[1].split("```", 1)[0]
    found = load_safety(write(tmp_path, text))
    assert found.singularity.stop == 30.0
    assert found.forces[0].names == ("force_x", "force_y", "force_z")


def test_the_executors_process_gets_the_file():
    from hardware.ros.processes import RosDeployment, executor_command

    command = executor_command(RosDeployment(policy=Path("p"), safety=Path("arm.yaml")))
    assert command[command.index("--safety") + 1] == "arm.yaml"
    assert "--safety" not in executor_command(RosDeployment(policy=Path("p")))
