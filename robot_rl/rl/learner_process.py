"""The learner of human-in-the-loop learning, in a process of its own: ``python -m robot_rl.rl.learner_process DIR FD``.

``DIR/settings.json`` says what to learn, ``FD`` is the inherited socket to the actor. Everything else is the off-policy
core and the one outer loop of fine-tuning; the directory is a run like any other and is continued if it holds one.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from robot_rl.core.errors import ConfigError, RobotRLError
from robot_rl.core.spec import Spec

SETTINGS = "settings.json"
"""File of a learner's settings."""
INITIAL = "initial"
"""Checkpoint of the policy that the actor builds; weights follow over the channel."""
_NO_LIMIT = 1 << 60
Method = Literal["serl", "hil_serl", "hg_dagger"]


@dataclass(frozen=True)
class LearnerSettings:
    """What a learner process learns, and from what."""

    method: Method
    """serl: demonstrations and reward. hil_serl: corrections as well. hg_dagger: imitation of both, without reward."""
    spec: dict[str, Any]
    """The robot's spec as JSON."""
    demos: str
    """Data set of demonstrations."""
    policy: str = ""
    """Checkpoint to start from (hg_dagger); its normaliser is used otherwise."""
    options: tuple[str, ...] = ()
    """Settings of the method as name=value."""
    pretrain: int = 1000
    """Updates on the demonstrations alone before anything acts."""
    corrections: int = 100_000
    """Most recent corrected steps that are kept as demonstrations."""
    seed: int = 0
    """Seed of weights and batches."""
    threads: int = 1
    """Processor threads."""
    device: str = "cpu"
    """Where networks run."""

    def write(self, directory: Path) -> None:
        """Write ``settings.json``."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / SETTINGS).write_text(json.dumps(dataclasses.asdict(self), indent=2))

    @classmethod
    def read(cls, directory: Path) -> LearnerSettings:
        """Read what `write` wrote; raises `ConfigError` if it cannot be read."""
        try:
            found = json.loads((directory / SETTINGS).read_text())
            return cls(**{**found, "options": tuple(found["options"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{directory / SETTINGS} cannot be read: {error}") from error


def method_settings(method: Method, options: Sequence[str] = ()) -> Any:
    """Return the settings of ``method``: HIL-SERL's (arXiv 2410.21845) for the two that learn from rewards."""
    from robot_rl.rl.methods.hg_dagger import DaggerConfig
    from robot_rl.rl.methods.rlpd import RLPDConfig
    from robot_rl.rl.off_policy.core import OffPolicyConfig
    from robot_rl.rl.options import override

    if method == "hg_dagger":
        return override(DaggerConfig(), options)
    core = OffPolicyConfig(
        discount=0.97,
        critics=2,
        subset=2,
        hidden=(128, 128),
        updates_per_step=1.0,
        actor_every=2,
        initial_temperature=0.01,
        entropy_backup=False,
        start_steps=300,
        replay_capacity=200_000,
    )
    return override(RLPDConfig(hidden=(128, 128), core=core), options)


def learn(directory: Path, connection: socket.socket) -> None:
    """Learn from what comes over ``connection`` until the other side ends it; the state is then on disk."""
    import torch

    from robot_rl.rl.session import SessionConfig, run_session
    from robot_rl.train.run import Run

    settings = LearnerSettings.read(directory)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    with Run.create(directory, settings, seed=settings.seed, resume=True, ignore=("threads", "demos")) as run:
        learner = make_learner(settings, run.path, connection)
        run_session(_Begun(learner), None, run, SessionConfig(steps=_NO_LIMIT, save_every=0.5))


def make_learner(settings: LearnerSettings, directory: Path, connection: socket.socket) -> Any:
    """Build the learner of ``settings`` and save the policy that acts as the checkpoint ``initial``."""
    from robot_rl.data.dataset import open_dataset
    from robot_rl.nets.device import find_device
    from robot_rl.policies.checkpoint import load_policy, save_policy
    from robot_rl.rl.channel import Channel
    from robot_rl.rl.off_policy.stream import EpisodeStream

    spec = Spec.from_json(settings.spec)
    stream = EpisodeStream(Channel(connection), spec)
    dataset = open_dataset(settings.demos)
    spec.require(dataset.spec, "the robot", "the demonstrations")
    frames = dataset.load(keys=list(spec.observation))
    device = find_device(settings.device)
    base = load_policy(settings.policy, device) if settings.policy else None
    config = method_settings(settings.method, settings.options)
    if settings.method == "hg_dagger":
        from robot_rl.rl.methods.hg_dagger import DaggerLearner

        if base is None:
            raise ConfigError("hg_dagger corrects a policy: give one (--policy)")
        learner: Any = DaggerLearner(base, stream, config, frames, settings.seed)
    else:
        learner = _reinforcement(settings, config, stream, base or _Interface(spec, device), frames)
    save_policy(learner.policy, directory / "checkpoints" / INITIAL)
    return learner


def _reinforcement(settings: LearnerSettings, config: Any, stream: Any, base: Any, frames: Any) -> Any:
    """Return the learner of serl and hil_serl."""
    from robot_rl.nets.device import device_of
    from robot_rl.rl.methods.rlpd import GaussianBehaviour, make_policy
    from robot_rl.rl.off_policy.collector import add_demonstrations, make_replay
    from robot_rl.rl.off_policy.core import OffPolicyCore
    from robot_rl.rl.off_policy.proposals import GaussianProposal
    from robot_rl.rl.off_policy.stream import StreamCollector, StreamLearner

    policy = make_policy(base, config, frames).to(device_of(base))
    core = OffPolicyCore(
        policy.actor.net.sizes[0], policy.actor.action_size, GaussianProposal(policy.actor), config.core, settings.seed
    )
    behaviour = GaussianBehaviour(policy, settings.seed)
    capacity = {"online": config.core.replay_capacity, "demonstrations": frames.num_frames + settings.corrections}
    sizes = core.state_size, core.action_size
    replay = make_replay(*sizes, capacity, settings.seed, behaviour.extra_fields, core.device)
    add_demonstrations(replay, frames, behaviour, config.decision, discount=config.core.discount)
    corrections = settings.method == "hil_serl"
    collector = StreamCollector(stream, behaviour, config.decision, corrections, config.core.discount)
    share = config.demonstration_share
    shares = {"online": 1 - share, "demonstrations": share}
    return StreamLearner(policy, collector, core, replay, shares, settings.pretrain)


@dataclass
class _Interface:
    """A policy's interface where there is no policy yet."""

    spec: Spec
    device: Any
    normalizer: Any = None


class _Begun:
    """A learner that begins when its session iterates first: after its state has been restored, if there is one."""

    def __init__(self, learner: Any) -> None:
        self._learner, self._begun = learner, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._learner, name)

    def iterate(self, fraction: float) -> dict[str, float]:
        if not self._begun:
            self._begun = True
            self._learner.begin()
        metrics: dict[str, float] = self._learner.iterate(fraction)
        return metrics


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the process; what goes wrong is one line in its log, and the exit code is 2."""
    directory, descriptor = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        learn(Path(directory), socket.socket(fileno=int(descriptor)))
    except RobotRLError as error:
        logging.error("%s", error)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
