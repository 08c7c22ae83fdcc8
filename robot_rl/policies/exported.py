"""Policies as ONNX files, run by ONNX Runtime: no torch is needed where they drive a robot.

A directory holds ``policy.json`` (what `robot_rl.policies.checkpoint` reads), one graph for a step of the sampler with
the normaliser inside, graphs for what some policies do besides, and ``parity.safetensors``: inputs with their start
noises and what the original policy answered. An export that does not repeat these answers is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from robot_rl.core.env import Observation
from robot_rl.core.errors import ConfigError, DataError, MissingDependencyError
from robot_rl.core.realtime import Commitment, RealTimeConfig, require_way
from robot_rl.core.spec import Spec

STEP, START, REFINE = "step", "start", "refine"
"""Graphs: one step of the sampler; start noise from a draw; correction of an action in closed loop."""
PARITY = "parity.safetensors"
_CASES = ("plan", "guided_identity", "prefix")


@dataclass(frozen=True)
class ExportedConfig:
    """What is known about an exported policy besides its spec."""

    obs_steps: int
    """Newest observations that the policy sees."""
    horizon: int
    """Actions per planned chunk."""
    execute_steps: int
    """Actions of a chunk that are executed before the next plan."""
    sample_steps: int
    """Runs of the step graph per plan."""
    noise_shape: tuple[int, ...]
    """Shape of one draw of noise: (H, A), or what the start graph takes."""
    noise_scale: float
    """Scale of a draw when planning."""
    real_time: tuple[str, ...]
    """Ways in which a running chunk can be continued."""
    prefix_steps: int
    """Most actions at the beginning of a chunk that the policy can be told."""
    graphs: dict[str, str]
    """SHA-256 of each graph's file by the graph's name."""
    tolerance: float
    """Largest difference to the recorded answers, as a share of half the action's range in the data."""
    source: str
    """Kind of the original policy."""

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return asdict(self)


class ExportedPolicy:
    """Plans as the policy that it was exported from; implements `robot_rl.core.policy.Policy`.

    Given the same observations and the same noise it gives the same chunks, within the recorded tolerance; its own
    stream of noises is another one than the original's.
    """

    kind = "exported"
    base = None

    def __init__(self, spec: Spec, config: ExportedConfig, sessions: Mapping[str, Any]) -> None:
        self.spec, self.config = spec, config
        self.obs_steps, self.horizon, self.execute_steps = config.obs_steps, config.horizon, config.execute_steps
        self.real_time, self.prefix_steps = config.real_time, config.prefix_steps
        self.closed_loop = REFINE in sessions
        self._sessions = sessions
        self.seed(0)

    @classmethod
    def open(
        cls, directory: Path, description: Mapping[str, Any], device: str = "cpu", threads: int | None = None
    ) -> ExportedPolicy:
        """Read an export and check that it gives the recorded answers.

        Args:
            directory: where `robot_rl.policies.export.export_policy` wrote it.
            description: the parsed ``policy`` part of its ``policy.json``.
            device: ``cpu``, or ``cuda`` with ONNX Runtime's GPU package.
            threads: threads of one inference; 1 by default, which leaves the others to the control loop.

        Raises:
            DataError: a file is missing, damaged or not the one that was exported, or the answers differ.
            MissingDependencyError: ONNX Runtime is not installed.
        """
        config, spec = read_config(directory, description)
        sessions = {name: _session(directory, name, digest, device, threads) for name, digest in config.graphs.items()}
        policy = cls(spec, config, sessions)
        worst = policy.parity(directory)
        if not worst <= config.tolerance:
            raise DataError(
                f"the export {directory} does not give the recorded answers: largest difference {worst:.2g} of the "
                f"action's half range, tolerated {config.tolerance:.2g}; export the policy again on this computer"
            )
        return policy

    def parity(self, directory: Path) -> float:
        """Return the largest difference to the recorded answers, as a share of half the action's range in the data."""
        record = _read_record(directory)
        try:
            history = {key: record[f"history.{key}"] for key in self.spec.observation}
            scale, differences = record["scale"], []
            for case in _CASES:
                if f"actions.{case}" in record:
                    planned = self.plan(history, record["noise"], self._recorded(case, record))
                    differences.append(np.abs(planned - record[f"actions.{case}"]) / scale)
            if self.closed_loop:
                refined = self.refine(history, record["refine.actions"])
                differences.append(np.abs(refined - record["refine.refined"]) / scale)
            return max(float(difference.max()) for difference in differences)
        except (KeyError, ValueError, IndexError) as error:
            raise DataError(f"{directory / PARITY} does not fit the export: {_line(error)}") from error

    def _recorded(self, case: str, record: Mapping[str, np.ndarray]) -> Commitment | None:
        if case == "plan":
            return None
        how = RealTimeConfig("prefix") if case == "prefix" else RealTimeConfig("guided", "identity")
        return Commitment(record["running"], record["remaining"], int(record["delay"]), how)

    def seed(self, seed: int) -> None:
        """Restart the stream of noises; one stream serves all lanes in their order."""
        self._rng = np.random.default_rng(seed)

    def plan(
        self, history: Observation, noise: np.ndarray | None = None, commitment: Commitment | None = None
    ) -> np.ndarray:
        """Return chunks (B, H, A) in the action's units for a history of arrays (B, T, …).

        Args:
            history: the newest observations.
            noise: (B, *noise_shape); None takes the next of the policy's own stream.
            commitment: what is executed while this is planned, to be continued.
        """
        feed = self._inputs(history)
        batch = len(next(iter(feed.values())))
        if noise is None:
            noise = self.config.noise_scale * self._rng.standard_normal((batch, *self.config.noise_shape), np.float32)
        x = np.asarray(noise, np.float32)
        if START in self._sessions:
            (x,) = self._run(START, ["x"], {**feed, "noise": x})
        feed |= self._continuation(batch, commitment)
        for k in range(self.config.sample_steps):
            wanted = ["actions" if k == self.config.sample_steps - 1 else "next"]
            (x,) = self._run(STEP, wanted, {**feed, "x": x, "index": np.full(batch, k, np.int64)})
        planned: np.ndarray = x
        return planned

    def refine(self, history: Observation, actions: np.ndarray) -> np.ndarray:
        """Return the actions (B, A) corrected for the newest history; unchanged by a policy that plans only."""
        if not self.closed_loop:
            return actions
        feed = {**self._inputs(history), "actions": np.asarray(actions, np.float32)}
        refined: np.ndarray = self._run(REFINE, ["refined"], feed)[0]
        return refined

    def _run(self, graph: str, outputs: list[str], feed: dict[str, np.ndarray]) -> list[Any]:
        try:
            found: list[Any] = self._sessions[graph].run(outputs, feed)
        except Exception as error:  # the library's errors have no base of their own
            raise DataError(f"the exported graph '{graph}' does not run on these inputs: {_line(error)}") from error
        return found

    def _inputs(self, history: Observation) -> dict[str, np.ndarray]:
        return {f"history.{key}": np.ascontiguousarray(history[key], np.float32) for key in self.spec.observation}

    def _continuation(self, batch: int, commitment: Commitment | None) -> dict[str, np.ndarray]:
        """Return the inputs of the step graph that make it go on from the running chunks, or change nothing."""
        shape = (batch, self.horizon)
        target, how = np.zeros((*shape, self.spec.action.size), np.float32), RealTimeConfig()
        weights, known = np.zeros(shape, np.float32), np.zeros(shape, bool)
        if commitment is not None:
            how = commitment.how
            require_way(self, how)
            target = np.ascontiguousarray(commitment.actions, np.float32)
            weights = commitment.weights if how.method == "guided" else weights
            known = commitment.known if how.method == "prefix" else known
        found = {"target": target, "weights": weights, "max_weight": np.array(how.max_weight, np.float32)}
        return found | ({"known": known} if self.prefix_steps else {})


def read_config(directory: Path, description: Mapping[str, Any]) -> tuple[ExportedConfig, Spec]:
    """Return what ``policy.json`` says; raises `DataError` if it does not describe an export."""
    try:
        found = description["config"].items()
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in found}
        config, spec = ExportedConfig(**values), Spec.from_json(description["spec"])
        if not set(config.graphs) <= {STEP, START, REFINE} or STEP not in config.graphs:
            raise ValueError(f"graphs {sorted(config.graphs)}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{directory / 'policy.json'} does not describe an export: {_line(error)}") from error
    return config, spec


def _session(directory: Path, name: str, digest: str, device: str, threads: int | None) -> Any:
    """Return an inference session of one graph; its file must be the one that was exported."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingDependencyError("onnxruntime", "onnx", "An exported policy") from error
    providers = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
    provider = providers.get(device.partition(":")[0])
    if provider is None or provider not in onnxruntime.get_available_providers():
        available = ", ".join(key for key, value in providers.items() if value in onnxruntime.get_available_providers())
        raise ConfigError(f"ONNX Runtime cannot run on '{device}' here; available: {available}")
    path = directory / f"{name}.onnx"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the exported graph {path}: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise DataError(f"{path} is damaged or not the file that was exported ({len(content)} bytes)")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads or 1, 1
    options.log_severity_level = 3
    # A thread that waits by spinning would take its processor from the control loop.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(content, options, providers=[provider])
    except Exception as error:  # the library's errors have no base of their own
        raise DataError(f"ONNX Runtime cannot load {path}: {_line(error)}") from error


def _read_record(directory: Path) -> dict[str, np.ndarray]:
    import safetensors.numpy

    try:
        record: dict[str, np.ndarray] = safetensors.numpy.load_file(directory / PARITY)
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(f"cannot read the parity record {directory / PARITY}: {_line(error)}") from error
    return record


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
