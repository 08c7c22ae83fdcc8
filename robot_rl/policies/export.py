"""Writes a policy as ONNX graphs that `robot_rl.policies.exported` runs without torch.

The graph is one step of the sampler, run as often as there are steps: any number of them costs one copy of the weights.
It takes raw observations and gives raw actions, with the normaliser inside, and continues a running chunk by guidance
past the network or, where trained for it, by a prefix.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import robot_rl
from robot_rl.core.errors import CapabilityError, ConfigError, MissingDependencyError
from robot_rl.core.realtime import Commitment, RealTimeConfig
from robot_rl.heads.continuation import ContinuationGuide, Prefix
from robot_rl.policies.checkpoint import FORMAT, read_description, replacing, write_tensors
from robot_rl.policies.chunked import ChunkedPolicy
from robot_rl.policies.exported import PARITY, REFINE, START, STEP, ExportedConfig, ExportedPolicy
from robot_rl.policies.residual import ResidualPolicy
from robot_rl.policies.steered import SteeredPolicy

TOLERANCE = 1e-3
"""Largest difference of the export's answers, as a share of half the action's range in the data."""
_BATCH, _RECORDED = 2, 4
_EXPORTABLE = "chunked policies with the head flow or diffusion (eta 0), and residual and steered ones on these"


def export_policy(policy: Any, directory: str | Path, metadata: dict[str, Any] | None = None) -> ExportedPolicy:
    """Write ``policy`` to ``directory`` and return it as it reads back; what is there is replaced when all is written.

    Args:
        policy: a policy as `robot_rl.policies.checkpoint.load_policy` returns it.
        directory: where to write.
        metadata: JSON-ready facts to keep.

    Raises:
        CapabilityError: this kind of policy cannot be exported; the message lists those that can.
        MissingDependencyError: the packages for writing ONNX are not installed.
        ConfigError: the directory holds something else than an export, the policy itself for example.
        DataError: the graphs do not give the policy's own answers, or cannot be written.
    """
    sampler, graphs = _graphs(policy)
    directory = Path(directory)
    if (directory / "policy.json").exists():
        kind = read_description(directory)["policy"]["kind"]
        if kind != "exported":  # it can be trained on, and its export cannot
            raise ConfigError(
                f"{directory} holds a checkpoint of kind '{kind}' and no export: choose another directory"
            )
    with replacing(directory, "policy.json", "export") as temporary:
        digests = {name: _write(graph, temporary / f"{name}.onnx") for name, graph in graphs.items()}
        config = _config(policy, sampler, digests)
        _record(policy, sampler, graphs, temporary)
        described = {"kind": "exported", "config": config.to_json(), "spec": policy.spec.to_json(), "base": None}
        description = {"format": FORMAT, "robot_rl": robot_rl.__version__, "policy": described}
        description["metadata"] = metadata or {}
        (temporary / "policy.json").write_text(json.dumps(description, indent=2))
        return ExportedPolicy.open(temporary, json.loads(json.dumps(described)))


class _Graph(nn.Module):
    """What becomes one ONNX graph: names and examples of its inputs, names of its outputs."""

    outputs: tuple[str, ...]

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy
        self.keys = tuple(policy.spec.observation)

    def examples(self) -> dict[str, Tensor]:
        """Return inputs by name, each (B, …) except scalars."""
        spec, steps = self.policy.spec, self.policy.obs_steps
        return {f"history.{key}": torch.rand(_BATCH, steps, *spec.observation[key].shape) for key in self.keys}

    def condition(self, history: tuple[Tensor, ...]) -> Tensor:
        found: Tensor = self.policy.encode(dict(zip(self.keys, history, strict=True)))
        return found


class _Step(_Graph):
    """One step of the sampler: iterates (B, H, A) in, the next ones out, and what they are as actions."""

    outputs = ("next", "actions")

    def examples(self) -> dict[str, Tensor]:
        head = self.policy.head
        shape = (_BATCH, *head.noise_shape)
        known = {"known": torch.zeros(_BATCH, head.horizon, dtype=torch.bool)} if head.prefix_steps else {}
        return {
            **super().examples(),
            "x": torch.rand(shape),
            "index": torch.zeros(_BATCH, dtype=torch.long),
            "target": torch.rand(shape),
            "weights": torch.rand(_BATCH, head.horizon),
            "max_weight": torch.tensor(5.0),
            **known,
        }

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        count = len(self.keys)
        x, index, target, weights, max_weight, *known = inputs[count:]
        policy = self.policy
        target = policy.normalize_action(target)
        guide = ContinuationGuide(policy.head.path, target, weights, False, max_weight)
        prefix = Prefix(target, known[0]) if known else None
        x = policy.head.advance(x, index, self.condition(inputs[:count]), guides=[guide], prefix=prefix)
        return x, policy.unnormalize_action(x)


class _Start(_Graph):
    """A steered policy's start noise (B, H, A) from a standard normal draw (B, D)."""

    outputs = ("x",)

    def examples(self) -> dict[str, Tensor]:
        return {**super().examples(), "noise": torch.rand(_BATCH, self.policy.actor.action_size)}

    def condition(self, history: tuple[Tensor, ...]) -> Tensor:
        found: Tensor = self.policy.base.encode(dict(zip(self.keys, history, strict=True)))
        return found

    def forward(self, *inputs: Tensor) -> Tensor:
        noise: Tensor = self.policy.steer(self.condition(inputs[:-1]), inputs[-1])
        return noise


class _Refine(_Graph):
    """A residual policy's correction of actions (B, A)."""

    outputs = ("refined",)

    def examples(self) -> dict[str, Tensor]:
        return {**super().examples(), "actions": torch.rand(_BATCH, self.policy.spec.action.size)}

    def forward(self, *inputs: Tensor) -> Tensor:
        history = dict(zip(self.keys, inputs[:-1], strict=True))
        refined: Tensor = self.policy.corrected(history, inputs[-1])
        return refined


def _graphs(policy: Any) -> tuple[Any, dict[str, _Graph]]:
    """Return the policy that samples chunks, and the graphs of ``policy`` by name."""
    found: dict[str, _Graph] = {}
    sampler = policy
    if isinstance(sampler, ResidualPolicy):
        found[REFINE], sampler = _Refine(sampler), sampler.base
    if isinstance(sampler, SteeredPolicy):
        found[START], sampler = _Start(sampler), sampler.base
    if not isinstance(sampler, ChunkedPolicy) or getattr(sampler.head, "eta", 0.0) > 0:
        raise CapabilityError(f"a policy of kind '{policy.kind}' like this one cannot be exported; {_EXPORTABLE} can")
    return sampler, {STEP: _Step(sampler), **found}


def _config(policy: Any, sampler: ChunkedPolicy, digests: dict[str, str]) -> ExportedConfig:
    steered = START in digests
    shape = (policy_of(policy, SteeredPolicy).actor.action_size,) if steered else sampler.head.noise_shape
    return ExportedConfig(
        obs_steps=policy.obs_steps,
        horizon=policy.horizon,
        execute_steps=policy.execute_steps,
        sample_steps=sampler.head.steps,
        noise_shape=tuple(shape),
        noise_scale=1.0 if steered else sampler.config.start_scale,
        real_time=tuple(way for way in sampler.real_time if way != "guided_full"),
        prefix_steps=sampler.prefix_steps,
        graphs=digests,
        tolerance=TOLERANCE,
        source=policy.kind,
    )


def policy_of(policy: Any, kind: type) -> Any:
    """Return ``policy`` or the nearest of its bases that is a ``kind``."""
    while not isinstance(policy, kind):
        policy = policy.base
    return policy


@torch.no_grad()
def _record(policy: Any, sampler: ChunkedPolicy, graphs: dict[str, _Graph], directory: Path) -> None:
    """Write recorded inputs, start noises and the policy's own answers to them."""
    draw = torch.Generator().manual_seed(0)

    def uniform(key: str, *shape: int) -> Tensor:
        drawn = 2 * torch.rand(_RECORDED, *shape, generator=draw) - 1
        return sampler.normalizer.unnormalize(key, drawn.to(sampler.device)).cpu()

    arrays = {key: uniform(key, policy.obs_steps, *spec.shape) for key, spec in policy.spec.observation.items()}
    history = {key: value.numpy() for key, value in arrays.items()}
    size = policy.spec.action.size
    record: dict[str, Tensor] = {f"history.{key}": value for key, value in arrays.items()}
    record["running"] = uniform("action", policy.horizon, size)
    record["remaining"], record["delay"] = torch.tensor([0, 1, policy.horizon // 2, policy.horizon]), torch.tensor(2)
    record["scale"] = sampler.normalizer.unnormalize("action", torch.ones(size)) - sampler.normalizer.unnormalize(
        "action", torch.zeros(size)
    )
    start: Tensor | None = None
    if START in graphs:
        noise = torch.randn(_RECORDED, policy_of(policy, SteeredPolicy).actor.action_size, generator=draw)
        start = graphs[START](*arrays.values(), noise)
    else:
        noise = torch.randn(_RECORDED, *sampler.head.noise_shape, generator=draw)
    record["noise"] = noise
    ways = {"plan": None, "guided_identity": RealTimeConfig("guided", "identity"), "prefix": RealTimeConfig("prefix")}
    for way, how in ways.items():
        if how is None or way in sampler.real_time:
            running = (record["running"].numpy(), record["remaining"].numpy(), int(record["delay"]))
            commitment = None if how is None else Commitment(*running, how)
            planned = sampler.plan(history, noise if start is None else start, commitment)
            record[f"actions.{way}"] = torch.from_numpy(planned)
    if REFINE in graphs:
        record["refine.actions"] = record["actions.plan"][:, 0].contiguous()
        record["refine.refined"] = torch.from_numpy(policy.refine(history, record["refine.actions"].numpy()))
    write_tensors(directory / PARITY, record)


def _write(graph: _Graph, path: Path) -> str:
    """Write ``graph`` as an ONNX file for any batch size and return the file's SHA-256."""
    graph = _fast(copy.deepcopy(graph).cpu().eval())
    examples = graph.examples()
    batch = torch.export.Dim("batch", min=1, max=4096)
    shapes = tuple({0: batch} if value.ndim else {} for value in examples.values())
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                graph,
                tuple(examples.values()),
                input_names=list(examples),
                output_names=list(graph.outputs),
                dynamic_shapes=(shapes,),
                dynamo=True,
                verbose=False,
            )
        except ModuleNotFoundError as error:
            raise MissingDependencyError(str(error.name), "onnx", "Writing a policy as ONNX") from error
    assert program is not None
    program.save(path, external_data=False)
    return hashlib.sha256(path.read_bytes()).hexdigest()


class _Mish(nn.Module):
    """x tanh(log(1 + e^x)) with one exponential: what the exporter writes for it costs three times as much."""

    def forward(self, x: Tensor) -> Tensor:
        e = x.clamp(max=20.0).exp()
        n = e * (e + 2)
        return x * (n / (n + 2))


class _Convolution(nn.Module):
    """A 1-D convolution as a 2-D one, for which ONNX Runtime has its blocked kernels on processors."""

    def __init__(self, original: nn.Conv1d) -> None:
        super().__init__()
        self.stride, self.padding = (1, *original.stride), (0, *original.padding)
        self.weight = nn.Parameter(original.weight[:, :, None])
        self.bias = original.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x[:, :, None], self.weight, self.bias, self.stride, self.padding)[:, :, 0]


def _fast(module: nn.Module) -> Any:
    """Replace layers by others of the same values that ONNX Runtime runs faster."""
    for name, child in module.named_children():
        if isinstance(child, nn.Mish):
            setattr(module, name, _Mish())
        elif type(child) is nn.Conv1d and child.groups == 1 and child.dilation == (1,):
            setattr(module, name, _Convolution(child))
        else:
            _fast(child)
    return module


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's remarks about packages that are not wanted from the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.__trace", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
