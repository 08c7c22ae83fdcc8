"""Real-time chunking: chunks go on from each other however long they take to plan, counted in executed actions."""

import numpy as np
import pytest
from deployment_rig import Rig, WanderingPolicy

from hardware.policy_process import PolicyServer
from hardware.robots.fake import FakeRobot
from robot_rl.core.errors import CapabilityError, ConfigError
from robot_rl.core.realtime import RealTimeConfig
from robot_rl.core.teleop import OperatorEvent
from robot_rl.rollout.player import Delays, PolicyRunner

HORIZON, EXECUTE, SPEED = 8, 4, 0.02


class SwervingPolicy(WanderingPolicy):
    """Goes one way in one chunk and the other way in the next, unless it is told to go on from the running one."""

    real_time = ("guided_identity", "prefix")
    prefix_steps = HORIZON

    def __init__(self, spec, delay=0):
        super().__init__(spec, horizon=HORIZON, execute_steps=EXECUTE)
        self.delay, self.rig, self.commitments = delay, None, []

    def plan(self, history, commitment=None):
        self.planned += 1
        self.commitments.append(commitment)
        heading = 1.0 if self.planned % 2 else -1.0
        start = history["state"][:, -1:]
        if commitment is not None:
            running, known = commitment.actions, int(commitment.known[0].sum())
            heading = float(np.sign(running[0, -1, 0] - running[0, 0, 0])) or heading
            start = running[:, known - 1 : known] - heading * SPEED * known
        chunk = start + heading * SPEED * np.arange(1, HORIZON + 1)[None, :, None]
        if commitment is not None:
            chunk[:, :known] = running[:, :known]
        if self.rig is not None:
            self.rig.tick(count=self.delay * self.rig.executor.ticks_per_step)  # the robot goes on meanwhile
        return np.clip(chunk, -0.9, 0.9).astype(np.float32)


def drive(delay, real_time, seconds=1.8):
    """Return the rig, the policy's actions and the commands, tick by tick, while the policy drives."""
    policy = SwervingPolicy(FakeRobot().spec)
    rig = Rig(policy, late_steps=HORIZON - EXECUTE, interpolation="linear")
    rig.server = PolicyServer(policy, rig.transport.policy, real_time)
    rig.transport.on_observation = None
    rig.tick(OperatorEvent.ENABLE)
    rig.server.serve_once()
    policy.rig, policy.delay = rig, delay
    actions, commands = [], []
    tick = rig.executor.tick

    def watched(*arguments, **options):
        verdict = tick(*arguments, **options)
        action = rig.executor.playback.action()
        driven = rig.mode == "auto"
        actions.append(action[0] if driven and action is not None else np.nan)
        commands.append(verdict.command[0])
        return verdict

    rig.executor.tick = watched
    while rig.clock.now < 100.0 + seconds:
        rig.tick()
        rig.server.serve_once()
        if rig.clock.now < 100.3:
            rig.executor.safety.counts.clear()  # the start from rest
    return rig, np.array(actions), np.array(commands)


@pytest.mark.parametrize("delay", range(HORIZON + 1))
def test_the_seam_is_no_larger_than_a_step_whatever_the_delay(delay):
    rig, actions, commands = drive(delay, RealTimeConfig("prefix", max_delay=HORIZON - EXECUTE))
    limit = rig.executor.safety.limits.velocity[0] * rig.executor.dt
    assert np.abs(np.diff(commands)).max() <= limit + 1e-9
    jumps = np.abs(np.diff(actions))
    if delay < HORIZON - EXECUTE:
        # What the policy wants is smooth already: nothing is left for the safety chain to do.
        assert np.nanmax(jumps) <= 1.01 * SPEED
        assert np.isfinite(jumps).mean() > 0.95
        assert not rig.executor.safety.counts
        assert rig.server.report.late == 0
        assert rig.server.report.largest_delay == delay + 1
    else:
        assert rig.executor.safety.counts["policy_starved"] > 0  # it brakes and holds, again and again


def test_without_it_the_seam_is_a_jump_that_only_the_safety_chain_takes_away():
    rig, actions, commands = drive(2, RealTimeConfig())
    assert np.nanmax(np.abs(np.diff(actions))) > 3 * SPEED
    assert rig.executor.safety.counts["velocity_limited"] > 0
    assert np.abs(np.diff(commands)).max() <= rig.executor.safety.limits.velocity[0] * rig.executor.dt + 1e-9


def test_the_running_chunk_is_handed_over_as_the_robot_will_have_executed_it():
    rig, _, _ = drive(2, RealTimeConfig("guided", "identity", max_delay=4))
    first, second, *others = rig.policy.commitments
    assert first is None  # there was nothing to go on from
    assert second.delay == 4  # nothing counted yet: the largest
    assert {one.delay for one in others} == {3}  # two actions passed, the third was playing
    assert all(one.remaining[0] == HORIZON - EXECUTE for one in others)
    assert all((one.actions[0, one.remaining[0] :] == one.actions[0, -1]).all() for one in others)  # padded by the last


def test_delays_are_the_most_of_the_last_ten():
    delays = Delays(6)
    assert delays.expected == 6
    for begun in (4, 0, 1):
        delays.add(begun)
    assert delays.expected == 5
    for _ in range(10):
        delays.add(0)
    assert delays.expected == 1
    delays.add(9)
    assert delays.expected == 6


def test_a_flush_begins_anew_and_its_plan_is_not_counted():
    policy = SwervingPolicy(FakeRobot().spec)
    rig = Rig(policy)
    rig.server = PolicyServer(policy, rig.transport.policy, RealTimeConfig("prefix"))
    rig.start()
    rig.tick(count=60)
    assert policy.commitments[-1] is not None
    count = len(policy.commitments)
    rig.tick(OperatorEvent.HOLD)
    rig.tick(count=20)
    rig.tick(OperatorEvent.HAND_BACK)
    rig.tick(count=8)
    assert rig.mode == "auto"
    assert policy.commitments[count:][-1] is None


def test_policies_that_cannot_are_refused():
    with pytest.raises(CapabilityError, match="in no way"):
        PolicyRunner(WanderingPolicy(FakeRobot().spec), 1, RealTimeConfig("guided"))
    with pytest.raises(ConfigError, match=r"max_delay in 1\.\.4"):
        PolicyRunner(SwervingPolicy(FakeRobot().spec), 1, RealTimeConfig("prefix", max_delay=5))


@pytest.mark.parametrize("jacobian", ["full", "identity"])
def test_a_chunked_policy_is_guided_by_its_own_running_chunk(jacobian):
    torch = pytest.importorskip("torch")
    from robot_rl.policies.chunked import ChunkedConfig, ChunkedPolicy

    torch.manual_seed(0)
    config = ChunkedConfig(width=32, depth=1, horizon=8, execute_steps=2, sample_steps=5)
    policy = ChunkedPolicy(FakeRobot().spec, config).eval()
    torch.nn.init.normal_(policy.head.backbone.leave.weight, std=0.05)
    runner = PolicyRunner(policy, 4, RealTimeConfig("guided", jacobian))
    state, gaps = {"state": np.zeros((4, 3), np.float32)}, []
    for _ in range(20):
        action = runner.step(state)
        if runner.planned.all() and runner.commitment is not None:
            gaps.append(np.abs(action - runner.commitment.actions[:, 0]).mean())
    assert len(gaps) == 9
    assert np.mean(gaps) < 0.25  # two chunks that know nothing of each other differ by about 0.8
