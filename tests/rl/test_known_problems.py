"""Every fine-tuning method on tiny problems with known answers, and the rules that all of them keep."""

import numpy as np
import pytest
import torch

from robot_rl.core import registry
from robot_rl.policies.gaussian import GaussianConfig, GaussianPolicy, SquashedGaussian
from robot_rl.policies.residual import ResidualPolicy, ResidualPolicyConfig
from robot_rl.rl.off_policy.core import OffPolicyConfig, OffPolicyCore
from robot_rl.rl.off_policy.n_step import NStepRows
from robot_rl.rl.off_policy.proposals import GaussianProposal
from robot_rl.rl.testing import (
    CHAIN,
    OFFSET,
    REGULATOR,
    SPEC,
    TWO_MODES,
    ChainEnv,
    RegulatorEnv,
    check_learns,
    check_refuses,
    check_resumes,
    check_stops_at_nan,
    clone,
)

torch.set_num_threads(1)

METHODS = registry.names("finetuners")

# What each method is for: (problem, steps, settings). A method that is not listed is asked for the bandit. Left out:
# - the bandit and the chain for corrections (residual, residual_offpolicy): they cannot change the base's mode;
# - the offset and the regulator for what steers, chooses or re-weights a base's samples (dsrl, qchunk, expo, dppo,
#   reinflow, fpo, gorl): these bases have one mode, and it is not the answer;
# - the offset for what acts without the base (rlpd, ppo): there is nothing to undo;
# - the regulator for residual_offpolicy and the chain for the others: tests that ask their cores nothing new.
SOLVES = {
    "residual": [(OFFSET, 5000, ("scale=0.2",)), (REGULATOR, 3000, ("scale=0.5",))],
    "residual_offpolicy": [(OFFSET, 2500, ("scale=0.2", "critic_updates=100", "n_steps=2", "anchor=0.1"))],
    "dsrl": [(TWO_MODES, 2500, ())],
    "rlpd": [
        (CHAIN, 2500, ()),
        (TWO_MODES, 1000, ("critics=2",)),
        (REGULATOR, 2000, ("critics=2", "actor_every=2", "tau=0.02", "core.discount=0.9")),
    ],
    "ppo": [(CHAIN, 6000, ()), (TWO_MODES, 2000, ()), (REGULATOR, 4500, ("core.discount=0.9",))],
    "dppo": [(TWO_MODES, 4000, ())],
    "reinflow": [(TWO_MODES, 4000, ())],
    "fpo": [(TWO_MODES, 4000, ("core.actor_learning_rate=1e-3",))],
    "gorl": [(TWO_MODES, 4000, ())],
    "qchunk": [(TWO_MODES, 1500, ())],
    "expo": [(CHAIN, 2000, ())],
}
CASES = [(name, *case) for name in METHODS for case in SOLVES.get(name, [(TWO_MODES, 3000, ())])]


@pytest.mark.parametrize(
    ("name", "problem", "steps", "options"), CASES, ids=[f"{c[0]}-{c[1].env.__name__}" for c in CASES]
)
def test_method_solves_a_known_problem(name, problem, steps, options, tmp_path):
    check_learns(name, problem, tmp_path / "run", steps=steps, options=options)


def test_the_regulator_knows_its_optimum():
    """Whatever is done costs the optimum from the start, less what is left at the end, plus the regret of each action.

    The optimum succeeds from every start, and what its base does from near 0 alone.
    """
    rng, x, golden = np.random.default_rng(0), np.linspace(-1, 1, 101), (1 + 5**0.5) / 2
    for act in (lambda x: rng.uniform(-1, 1, len(x)), lambda x: -x / golden, lambda x: -x):
        env, paid, regret = RegulatorEnv(num_envs=101), 0.0, 0.0
        env.state[:, 0] = x
        for time in range(env.max_episode_steps):
            state = env.state[:, 0].copy()
            action = act(state).astype(np.float32)
            step = env.step(action[:, None])
            assert not step.terminated.any()
            assert (step.truncated == (time == 3)).all()
            paid, regret = paid - step.reward, regret + (1 + golden) * (action + state / golden) ** 2
        left = step.final_observation["state"][:, 0]
        np.testing.assert_allclose(paid + golden * left**2, golden * x**2 + regret, atol=1e-4)
        assert (step.info["success"] == (regret < 0.05)).all()
    assert step.info["success"].tolist() == (np.abs(x) < 0.361).tolist()


@pytest.mark.parametrize("name", METHODS)
def test_interrupted_run_goes_on(name, tmp_path):
    few = ("critic_updates=100",) if name == "residual_offpolicy" else ()
    check_resumes(name, TWO_MODES, tmp_path / "run", options=few)


@pytest.mark.parametrize("name", METHODS)
def test_reward_that_is_not_a_number_stops_the_run(name, tmp_path):
    check_stops_at_nan(name, TWO_MODES, tmp_path / "run")


@pytest.mark.parametrize("where", ["observation", "reset", "loss"])
@pytest.mark.parametrize("name", ["ppo", "rlpd"])
def test_whatever_is_not_a_number_stops_both_cores(name, where, tmp_path):
    check_stops_at_nan(name, TWO_MODES, tmp_path / "run", where=where)


def _base(kind):
    if kind == "gaussian":
        return GaussianPolicy(SPEC, GaussianConfig(hidden=(8,), low=(-1.0,), high=(1.0,)))
    if kind == "residual":
        return ResidualPolicy(clone(TWO_MODES), ResidualPolicyConfig(hidden=(8,)))
    return clone(TWO_MODES, kind)


@pytest.mark.parametrize(
    ("name", "kind", "listed"),
    [
        ("dppo", "flow", "diffusion"),
        ("reinflow", "diffusion", "flow"),
        ("fpo", "diffusion", "flow"),
        ("residual", "residual", "'chunked' or 'chain'"),
        ("residual_offpolicy", "residual", "'chunked' or 'chain'"),
        ("residual", "gaussian", "'chunked' or 'chain'"),
        ("dsrl", "gaussian", "diffusion, flow"),
        ("gorl", "gaussian", "diffusion, flow"),
        ("qchunk", "gaussian", "diffusion, flow"),
        ("qchunk", "residual", "'chunked' and 'chain'"),
        ("expo", "gaussian", "diffusion, flow"),
    ],
)
def test_wrong_base_is_refused(name, kind, listed, tmp_path):
    check_refuses(name, _base(kind), TWO_MODES, tmp_path / "run", listed)


def chain_rows(n_steps, discount, lanes=32, steps=160):
    """Rows of a policy that goes either way in the chain, joined over ``n_steps``."""
    env, rng, rows = ChainEnv(num_envs=lanes), np.random.default_rng(0), NStepRows(lanes, n_steps, discount)
    found, state = [], env.reset(0)["state"]
    for _ in range(steps):
        action = rng.choice([-0.5, 0.5], (lanes, 1)).astype(np.float32)
        step = env.step(action)
        single = {"state": state[:, :1], "action": action, "next_state": step.final_observation["state"][:, :1]}
        single |= {"reward": step.reward, "terminated": step.terminated, "truncated": step.truncated}
        single |= {"exponent": np.ones(lanes), "weight": np.ones(lanes)}
        found.append(rows.push(torch.arange(lanes), {k: torch.as_tensor(v).float() for k, v in single.items()}))
        state = step.observation["state"]
    return {name: torch.cat([row[name] for row in found]) for name in found[0]}


class _Right(GaussianProposal):
    """Goes right, whatever the state."""

    def backup(self, batch, eps, critic, target):
        """Return the action 0.5 and a log-density of 0."""
        return torch.full_like(eps, 0.5), eps.new_zeros(len(eps))


@pytest.mark.parametrize("n_steps", [1, 2])
def test_critic_finds_the_value_of_the_chain(n_steps):
    """The value q of going right, from rows of a policy that goes either way.

    With one step, q is the discount to the power of the steps that follow. With two, a row goes either way once before
    q is asked: q(0) = d/2 + d^2/2 q(0) and q(-1/2) = d^2/2 (q(1/2) + q(-1/2)), with d the discount and q(1/2) = 1.
    """
    discount = 0.8
    torch.manual_seed(0)
    rows = chain_rows(n_steps, discount)
    config = OffPolicyConfig(
        batch_size=256, hidden=(32,), discount=discount, tau=0.1, critic_learning_rate=3e-3, entropy_backup=False,
        precision="fp32", target_entropy=0.0,
    )  # fmt: skip
    core = OffPolicyCore(1, 1, _Right(SquashedGaussian(1, 1, (8,))), config)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        index = torch.randint(len(rows["reward"]), (10, 256), generator=generator)
        core.update({name: values[index] for name, values in rows.items()})
    place = torch.tensor([[-0.5], [0.0], [0.5]])
    with torch.no_grad():
        right = core.critic(place, torch.full((3, 1), 0.5)).mean(0)
        left = core.critic(place, torch.full((3, 1), -0.5)).mean(0)
    d, half = discount, discount**2 / 2
    if n_steps == 1:
        expected_right, expected_left = [d**2, d, 1.0], [0.3, d**3, d**2]
    else:
        expected_right = [half / (1 - half), d / 2 / (1 - half), 1.0]
        low, middle, _ = expected_right
        expected_left = [0.3, 0.3 * d / 2 + half * middle, half * (1 + low)]
    np.testing.assert_allclose(right, expected_right, atol=0.05)
    np.testing.assert_allclose(left, expected_left, atol=0.05)
