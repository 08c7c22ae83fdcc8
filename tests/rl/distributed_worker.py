"""One of two processes that learn together; `test_distributed.py` starts both and compares what they leave."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from robot_rl.core import registry
from robot_rl.core.errors import CapabilityError
from robot_rl.policies.residual import ResidualPolicy, ResidualPolicyConfig
from robot_rl.rl.methods.residual import ResidualActor
from robot_rl.rl.on_policy.learner import OnPolicyConfig, OnPolicyLearner
from robot_rl.rl.session import SessionConfig, run_session
from robot_rl.train import distributed
from robot_rl.train.run import Run

LANES = 6
CONFIG = OnPolicyConfig(
    rollout_steps=12, epochs=3, minibatches=1, value_hidden=(32,), warmup_iterations=0, target_kl=0.0
)


def toys():
    spec = importlib.util.spec_from_file_location("toys", Path(__file__).parent / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_learner(seed, lanes=LANES, config=CONFIG):
    found = toys()
    registry.register("policies", "fake_base", found.FakeBase)
    env = found.ReachEnv(lanes, limit=7)
    torch.manual_seed(seed)
    policy = ResidualPolicy(found.FakeBase(env.spec, offset=0.2), ResidualPolicyConfig(hidden=(32,), scale=0.3))
    # A new residual ends in zeros, and would be the same whatever the seed.
    for parameter in policy.actor.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    policy.actor.requires_grad_(True)
    policy.log_std.requires_grad_(True)
    return OnPolicyLearner(ResidualActor(policy, lanes, seed=seed), env, config, seed=1000 * seed)


def weights(learner):
    tensors = {f"actor.{i}": p.detach().clone() for i, p in enumerate(learner.actor.parameters())}
    return tensors | {f"value.{name}": p.detach().clone() for name, p in learner.critics.value.state_dict().items()}


def functions(rank):
    values = torch.arange(5.0) if rank == 0 else torch.tensor([10.0, 20.0])
    own = np.array([len(values), values.mean().item(), (values - values.mean()).square().sum().item()])
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([1.0, 2.0]) if rank == 0 else torch.tensor([4.0, -4.0])
    distributed.all_reduce_gradients([parameter], weight=1 + 2 * rank)
    shared = [torch.full((2,), float(rank)), torch.tensor([rank])]
    distributed.broadcast(shared)
    mean, deviation = distributed.moments(values)
    return {
        "moments": [mean.item(), deviation.item()],
        "pooled": distributed.pooled(own).tolist(),
        "gradient": parameter.grad.tolist(),
        "mean": distributed.mean(float(rank), weight=1 + 2 * rank),
        "broadcast": [tensor.tolist() for tensor in shared],
        "from_first": distributed.from_first(7.0 + rank),
    }


def session(out, steps):
    found = toys()
    learner = make_learner(distributed.rank(), config=dataclasses.replace(CONFIG, minibatches=2))
    settings = SessionConfig(steps=steps, evaluations=2, eval_episodes=4, eval_lanes=4)
    with Run.create(distributed.directory(out / "run"), {}, seed=distributed.rank(), resume=True) as run:
        run_session(learner, lambda num_envs: found.ReachEnv(num_envs, limit=7), run, settings)
    return learner


def main(out):
    rank = distributed.start()
    facts = functions(rank)
    learner = make_learner(rank)
    learner.update(learner.collect(), 0.0)
    save_file(weights(learner), out / f"update_{rank}.safetensors")
    first = session(out, 4 * 2 * LANES * CONFIG.rollout_steps)
    facts["steps"] = [first.steps]
    again = session(out, 6 * 2 * LANES * CONFIG.rollout_steps)
    facts["steps"].append(again.steps)
    save_file(weights(again), out / f"session_{rank}.safetensors")
    try:
        run_session(object(), None, None, SessionConfig(steps=1))
    except CapabilityError as error:
        facts["refused"] = str(error)
    (out / f"facts_{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
