"""How fast the off-policy core updates, against Stable-Baselines3 and a plain PyTorch loop, and that it learns."""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common import report
from robot_rl.core.registry import make_env
from robot_rl.policies.gaussian import GaussianConfig, GaussianPolicy, SquashedGaussian
from robot_rl.rl.decision import DecisionConfig
from robot_rl.rl.methods.rlpd import GaussianBehaviour
from robot_rl.rl.off_policy.collector import Collector, make_replay
from robot_rl.rl.off_policy.core import OffPolicyConfig, OffPolicyCore
from robot_rl.rl.off_policy.learner import OffPolicyLearner
from robot_rl.rl.off_policy.proposals import GaussianProposal

STATE, ACTION, BATCH, ROWS = 39, 28, 256, 10_000
TASK = "Pendulum-v1"


def random_rows() -> dict[str, np.ndarray]:
    """Return transitions of the sizes that are measured."""
    rng = np.random.default_rng(0)
    rows = {name: rng.standard_normal((ROWS, STATE)).astype(np.float32) for name in ("state", "next_state")}
    rows["action"] = rng.uniform(-1, 1, (ROWS, ACTION)).astype(np.float32)
    rows["reward"] = rng.standard_normal(ROWS).astype(np.float32)
    rows |= {name: np.zeros(ROWS, np.float32) for name in ("terminated", "truncated")}
    return rows | {name: np.ones(ROWS, np.float32) for name in ("exponent", "weight")}


def sac(precision: str, critics: int = 2) -> OffPolicyConfig:
    """Return SAC's settings on our core: two critics without LayerNorm, an actor update with every critic update."""
    return OffPolicyConfig(
        batch_size=BATCH,
        critics=critics,
        subset=2,
        actor_reduce="min",
        layer_norm=False,
        precision=precision,  # type: ignore[arg-type]
        target_entropy=-float(ACTION),
    )


def ours(precision: str, critics: int = 2) -> Callable[[int], None]:
    """Return a function that makes n updates, sampling included."""
    torch.manual_seed(0)
    core = OffPolicyCore(
        STATE, ACTION, GaussianProposal(SquashedGaussian(STATE, ACTION, (256, 256))), sac(precision, critics)
    )
    replay = make_replay(STATE, ACTION, {"online": ROWS}, 0)
    replay.add("online", random_rows())
    return lambda n: core.update(replay.sample(n, BATCH, {"online": 1.0})) and None


def stable_baselines(critics: int = 2) -> Callable[[int], None]:
    """Return the same for Stable-Baselines3's SAC with its default networks (2 x 256)."""
    import gymnasium as gym
    from stable_baselines3 import SAC

    class Blank(gym.Env):
        observation_space = gym.spaces.Box(-np.inf, np.inf, (STATE,), np.float32)
        action_space = gym.spaces.Box(-1, 1, (ACTION,), np.float32)

        def reset(self, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
            return np.zeros(STATE, np.float32), {}

        def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
            return np.zeros(STATE, np.float32), 0.0, False, False, {}

    model = SAC(
        "MlpPolicy",
        Blank(),
        batch_size=BATCH,
        device="cpu",
        learning_starts=1,
        buffer_size=ROWS,
        verbose=0,
        policy_kwargs={"n_critics": critics},
    )
    model.learn(2)
    rows = random_rows()
    for i in range(ROWS):
        row = {k: rows[k][i : i + 1] for k in ("state", "next_state", "action", "reward", "terminated")}
        model.replay_buffer.add(*row.values(), [{}])
    return lambda n: model.train(n, BATCH)


def plain(members: int = 2, transform: Callable[[nn.Module], Any] = lambda net: net) -> Callable[[int], None]:
    """Return the same for SAC as one writes it down: separate networks of `torch.nn.Linear`, three Adams, a loop.

    ``transform`` is applied to each network before it is used, `torch.compile` for example.
    """
    torch.manual_seed(0)

    def network(n_in: int, n_out: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(n_in, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, n_out))

    actor, critics = network(STATE, 2 * ACTION), [network(STATE + ACTION, 1) for _ in range(members)]
    targets, log_alpha = copy.deepcopy(critics), torch.zeros(1, requires_grad=True)
    actor, critics, targets = transform(actor), [transform(one) for one in critics], [transform(one) for one in targets]
    critic_parameters = [p for critic in critics for p in critic.parameters()]
    optimizers = [torch.optim.Adam(p, lr=3e-4) for p in (list(actor.parameters()), critic_parameters, [log_alpha])]
    data = {name: torch.from_numpy(rows) for name, rows in random_rows().items()}

    def act(state: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = actor(state).chunk(2, -1)
        distribution = torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp())
        pre = distribution.rsample()
        action = pre.tanh()
        return action, (distribution.log_prob(pre) - (1 - action**2 + 1e-6).log()).sum(-1)

    def value(networks: list[nn.Sequential], state: Tensor, action: Tensor) -> Tensor:
        return torch.stack([net(torch.cat([state, action], -1)).squeeze(-1) for net in networks])

    def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def update(n: int) -> None:
        for _ in range(n):
            index = torch.randint(ROWS, (BATCH,))
            batch = {name: rows[index] for name, rows in data.items()}
            alpha = log_alpha.exp().detach()
            with torch.no_grad():
                action, log_prob = act(batch["next_state"])
                drawn = [targets[k] for k in torch.randperm(members)[:2]]
                following = value(drawn, batch["next_state"], action).amin(0) - alpha * log_prob
                target = batch["reward"] + 0.99 * (1 - batch["terminated"]) * following
            error = value(critics, batch["state"], batch["action"]) - target
            descend(optimizers[1], 0.5 * error.square().mean(-1).sum())
            action, log_prob = act(batch["state"])
            descend(optimizers[0], (alpha * log_prob - value(critics, batch["state"], action).amin(0)).mean())
            descend(optimizers[2], -(log_alpha * (log_prob.detach() - ACTION)).mean())
            with torch.no_grad():
                for critic, following_critic in zip(critics, targets, strict=True):
                    for p, q in zip(critic.parameters(), following_critic.parameters(), strict=True):
                        q.lerp_(p, 0.005)

    return update


def gflop(critics: int) -> float:
    """Return 10^9 floating-point operations in the matrix products of one of our updates."""
    first, hidden, last = (STATE + ACTION) * 256, 256 * 256, 256
    critic, actor = first + hidden + last, STATE * 256 + hidden + 256 * 2 * ACTION
    learning = critic + critic + (hidden + last)  # forward, gradients of weights, gradients of activations
    climbing = critic + (ACTION * 256 + hidden + last)  # forward, gradient of the action
    acting = 2 * actor + actor + (actor - STATE * 256)  # both forwards, then as above
    return 2 * BATCH * (critics * (learning + climbing) + min(2, critics) * critic + acting) / 1e9


def product(dtype: torch.dtype, size: int = 1024) -> tuple[Callable[[int], None], float]:
    """Return a function that makes n products of large square matrices, and the GFLOP of one."""
    a, b = torch.randn(2, size, size, dtype=dtype)
    return lambda n: [torch.mm(a, b) for _ in range(n)] and None, 2 * size**3 / 1e9


def time_in_turn(
    variants: dict[str, Callable[[int], None]], rounds: int, updates: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Return seconds per update, round by round, the variants taking turns so that a drifting machine is fair."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, update in variants.items():
            start = clock()
            update(updates)
            times[name].append((clock() - start) / updates)
    return {name: values[1:] for name, values in times.items()}


def pendulum_ours(seed: int, steps: int) -> list[float]:
    """Learn the pendulum with our core; returns the return of every episode."""
    torch.manual_seed(seed)
    env = make_env(f"gym:{TASK}", num_envs=1)
    policy = GaussianPolicy(env.spec, GaussianConfig(low=(-2.0,), high=(2.0,)))
    config = OffPolicyConfig(
        critic_learning_rate=1e-3,
        actor_learning_rate=1e-3,
        temperature_learning_rate=1e-3,
        actor_reduce="min",
        layer_norm=False,
        precision="bf16",
        target_entropy=-1.0,
        start_steps=256,
    )
    core = OffPolicyCore(3, 1, GaussianProposal(policy.actor), config, seed)
    replay = make_replay(3, 1, {"online": steps}, seed)
    collector = Collector(env, GaussianBehaviour(policy, seed), DecisionConfig(), seed)
    learner = OffPolicyLearner(policy, collector, core, replay, {"online": 1.0}, block=1)
    returns, ended = [], 0
    while learner.steps < steps:
        learner.iterate(0.0)
        if collector.episodes.total > ended:
            ended = collector.episodes.total
            returns.append(collector.episodes.last_return)
    env.close()
    return returns


def pendulum_stable_baselines(seed: int, steps: int) -> list[float]:
    """Learn the pendulum with Stable-Baselines3 at the same settings; returns the return of every episode."""
    import gymnasium as gym
    from stable_baselines3 import SAC
    from stable_baselines3.common.monitor import Monitor

    env = Monitor(gym.make(TASK))
    model = SAC("MlpPolicy", env, learning_rate=1e-3, learning_starts=256, seed=seed, device="cpu", verbose=0)
    model.learn(steps)
    return [float(value) for value in env.get_episode_rewards()]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="rounds of timing")
    parser.add_argument("--updates", type=int, default=32, help="updates per round and variant")
    parser.add_argument("--threads", type=int, default=2, help="processor threads")
    parser.add_argument("--steps", type=int, default=5000, help="environment steps of the learning check")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the learning check")
    parser.add_argument(
        "--clock",
        choices=("wall", "processor"),
        default="wall",
        help="processor: time of all threads, for a busy machine",
    )
    arguments = parser.parse_args()
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", category=UserWarning)
    variants = {
        "ours": ours("bf16"),
        "ours fp32": ours("fp32"),
        "ours 10 critics": ours("bf16", 10),
        "stable-baselines3": stable_baselines(),
        "stable-baselines3 10 critics": stable_baselines(10),
        "plain torch": plain(),
        "plain torch 10 critics": plain(10),
    }
    limits = {name: product(dtype) for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))}
    variants |= {name: multiply for name, (multiply, _) in limits.items()}
    times = time_in_turn(variants, arguments.rounds, arguments.updates, clock)
    rate = {name: 1 / statistics.median(values) for name, values in times.items()}

    def ratio(slow: str, fast: str = "ours") -> float:
        return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))

    limit = {name: work * rate[name] for name, (_, work) in limits.items()}  # GFLOP/s
    metrics = {
        "updates_per_s": rate["ours"],
        "updates_per_s_fp32": rate["ours fp32"],
        "updates_per_s_10_critics": rate["ours 10 critics"],
        "ratio_to_sb3": ratio("stable-baselines3"),
        "ratio_to_sb3_10_critics": ratio("stable-baselines3 10 critics", "ours 10 critics"),
        "ratio_to_plain_torch": ratio("plain torch"),
        "ratio_to_plain_torch_10_critics": ratio("plain torch 10 critics", "ours 10 critics"),
        "ten_critics_cost": ratio("ours 10 critics", "ours"),
        "ten_critics_work": gflop(10) / gflop(2),
        "bf16_gflop_per_s": limit["bf16"],
        "fp32_gflop_per_s": limit["fp32"],
        "gflop_per_update": gflop(2),
        "share_of_bf16_limit": gflop(2) * rate["ours"] / limit["bf16"],
        "share_of_bf16_limit_10_critics": gflop(10) * rate["ours 10 critics"] / limit["bf16"],
        "share_of_fp32_limit_in_fp32": gflop(2) * rate["ours fp32"] / limit["fp32"],
    }
    peers: dict[str, Any] = {
        "stable_baselines3_updates_per_s": rate["stable-baselines3"],
        "stable_baselines3_updates_per_s_10_critics": rate["stable-baselines3 10 critics"],
        "plain_torch_updates_per_s": rate["plain torch"],
        "plain_torch_updates_per_s_10_critics": rate["plain torch 10 critics"],
    }
    targets: dict[str, tuple[str, float]] = {"ratio_to_sb3": (">=", 3.0), "ten_critics_cost": ("<=", 2.0)}
    if arguments.seeds:
        curves = {"ours": [], "stable-baselines3": []}  # type: dict[str, list[list[float]]]
        for seed in range(arguments.seeds):
            curves["ours"].append(pendulum_ours(seed, arguments.steps))
            curves["stable-baselines3"].append(pendulum_stable_baselines(seed, arguments.steps))
        final = {name: float(np.mean([np.mean(c[-5:]) for c in curve])) for name, curve in curves.items()}
        metrics["pendulum_return"] = final["ours"]
        metrics["pendulum_return_above_sb3"] = final["ours"] - final["stable-baselines3"]
        peers["stable_baselines3_pendulum_return"] = final["stable-baselines3"]
        peers["pendulum_curves"] = {n: np.mean([c[:25] for c in curve], axis=0).round(0) for n, curve in curves.items()}
        # The last episodes' mean varies by about this much from seed to seed.
        targets["pendulum_return_above_sb3"] = (">=", -50.0)
    report(
        "sac_updates",
        seeds=list(range(arguments.seeds)),
        budget={
            "rounds": arguments.rounds,
            "updates_per_round": arguments.updates,
            "threads": arguments.threads,
            "clock": arguments.clock,
            "pendulum_steps": arguments.steps,
        },
        metrics=metrics,
        peers=peers,
        targets=targets,
        notes=(
            "One update: sample 256 rows, critic, actor, temperature, target; two critics of 2 x 256, state 39, action "
            "28. Ratios are medians over rounds in which the variants took turns. Ten critics: ours and the plain loop "
            "back up two drawn targets, Stable-Baselines3 all ten; their products are ten_critics_work times those of "
            "two. Shares: products of an update against large products of the same run and threads. The pendulum is "
            "the known task: mean return of the last five exploring episodes over seeds."
        ),
    )


if __name__ == "__main__":
    main()
