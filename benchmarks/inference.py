"""How long a policy takes to plan a chunk on one processor thread: torch, ONNX Runtime, and LeRobot's diffusion policy.

A diffusion policy with the 1-D U-Net, 16 actions of 7 numbers from two observations of 128, with about 5 and 22 million
parameters and with 4 and 10 steps of DDIM. Its export (`robot_rl.policies.export`) is loaded as `robot-rl deploy` loads
it, parity check included. Everything plans in turn in one process, so that whatever else runs disturbs all alike.

LeRobot's policy has the same widths, horizon, inputs and steps, and takes part where ``import lerobot`` works
(``--lerobot DIR`` adds a directory of packages to the import path); where it does not, the result says why.

Run: ``make bench NAME=inference`` or ``python benchmarks/inference.py [--seconds 20] [--sizes small large]``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import report
from robot_rl.core.spec import ArraySpec, Spec
from robot_rl.policies.checkpoint import load_policy
from robot_rl.policies.chunked import ChunkedConfig, ChunkedPolicy
from robot_rl.policies.export import export_policy

STATE, SURROUNDINGS, ACTION, HORIZON = 7, 121, 7, 16
SPEC = Spec(
    {"state": ArraySpec((STATE,)), "environment_state": ArraySpec((SURROUNDINGS,))},
    ArraySpec((ACTION,), low=(-1.0,) * ACTION, high=(1.0,) * ACTION),
    10.0,
)
WIDTHS = {"small": 64, "large": 144}
"""Width of the U-Net's first level: 5.3 and 22.5 million parameters."""
STEPS = (4, 10)
TARGETS = {"worst_eager_over_onnx": [">=", 3.0], "worst_lerobot_over_onnx": [">=", 3.0]}
NOTES = (
    "Time from a history to a chunk in the units of the action, normaliser included (LeRobot's pre- and postprocessors "
    "are not). Ratios are of medians. small and large: the size; 4 and 10: steps of DDIM."
)
_TORCHVISION = (
    *("nms", "qnms", "roi_align", "_roi_align_backward", "roi_pool", "_roi_pool_backward"),
    *("ps_roi_align", "_ps_roi_align_backward", "ps_roi_pool", "_ps_roi_pool_backward"),
    *("deform_conv2d", "_deform_conv2d_backward"),
)
"""Operators of torchvision's compiled part, which does not load beside every build of torch."""

Planner = Callable[[], Any]


def our_policy(width: int, steps: int) -> ChunkedPolicy:
    """Return an untrained policy whose output layer is not zero."""
    torch.manual_seed(0)
    config = ChunkedConfig(head="diffusion", backbone="unet", width=width, depth=3, sample_steps=steps)
    policy = ChunkedPolicy(SPEC, config).eval().requires_grad_(False)
    torch.nn.init.normal_(policy.head.backbone.leave[-1].weight, std=0.05)
    return policy


def lerobot_policy(width: int, steps: int) -> Any:
    """Return LeRobot's diffusion policy of the same shape; raises ImportError where it cannot be imported."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        # It is for images, of which there are none here: its operators need a name only, and are never called.
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in _TORCHVISION:
            library.define(f"{name}(Tensor x) -> Tensor")
        lerobot_policy.library = library  # type: ignore[attr-defined]  # the names live as long as this object
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

    torch.manual_seed(0)
    config = DiffusionConfig(
        n_obs_steps=2,
        horizon=HORIZON,
        n_action_steps=8,
        input_features={
            "observation.state": PolicyFeature(FeatureType.STATE, (STATE,)),
            "observation.environment_state": PolicyFeature(FeatureType.ENV, (SURROUNDINGS,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (ACTION,))},
        down_dims=(width, 2 * width, 4 * width),
        noise_scheduler_type="DDIM",
        num_inference_steps=steps,
        device="cpu",
    )
    return DiffusionPolicy(config).eval().requires_grad_(False)


def planners(width: int, steps: int, folder: Path, peer: bool) -> tuple[dict[str, Planner], dict[str, float]]:
    """Return what plans one chunk, by name, and the millions of parameters of each network."""
    rng = np.random.default_rng(0)
    history = {key: rng.normal(size=(1, 2, *one.shape)).astype(np.float32) for key, one in SPEC.observation.items()}
    policy = our_policy(width, steps)
    export_policy(policy, folder)
    exported = load_policy(folder)
    found: dict[str, Planner] = {"eager": lambda: policy.plan(history), "onnx": lambda: exported.plan(history)}
    millions = {"ours": sum(one.numel() for one in policy.head.parameters()) / 1e6}
    if peer:
        other = lerobot_policy(width, steps)
        batch = {f"observation.{key}": torch.from_numpy(value) for key, value in history.items()}

        def plan() -> Any:
            with torch.inference_mode():
                return other.diffusion.generate_actions(batch)

        found["lerobot"] = plan
        millions["lerobot"] = sum(one.numel() for one in other.parameters()) / 1e6
    return found, millions


def latencies(found: dict[str, Planner], seconds: float) -> dict[str, np.ndarray]:
    """Let all plan in turn, a few chunks each, for about ``seconds``; return the milliseconds of each chunk by name."""
    times: dict[str, list[float]] = {name: [] for name in found}
    for plan in found.values():
        for _ in range(3):
            plan()
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        for name, plan in found.items():
            for _ in range(3):
                begun = time.perf_counter()
                plan()
                times[name].append(1e3 * (time.perf_counter() - begun))
    return {name: np.array(values) for name, values in times.items()}


def peer_missing(directory: Path | None) -> str:
    """Return why LeRobot does not take part; empty if it does."""
    if directory is not None:
        sys.path.append(str(directory))
    try:
        lerobot_policy(16, 2)
    except (ImportError, RuntimeError, ValueError, TypeError) as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:160]
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of measuring, for each size and number of steps")
    parser.add_argument("--sizes", nargs="+", choices=list(WIDTHS), default=list(WIDTHS))
    parser.add_argument("--lerobot", type=Path, help="directory of packages with LeRobot in it")
    given = parser.parse_args()
    torch.set_num_threads(1)
    missing = peer_missing(given.lerobot)
    metrics: dict[str, float] = {}
    peers: dict[str, Any] = {"lerobot": {}}
    for size in given.sizes:
        for steps in STEPS:
            with tempfile.TemporaryDirectory() as folder:
                found, millions = planners(WIDTHS[size], steps, Path(folder) / "export", not missing)
                times = latencies(found, given.seconds)
            case = f"{size}_{steps}"
            for name, values in times.items():
                kept = peers["lerobot"] if name == "lerobot" else metrics
                prefix = case if name == "lerobot" else f"{case}_{name}"
                kept[f"{prefix}_p50_ms"], kept[f"{prefix}_p99_ms"] = np.percentile(values, (50, 99))
                if name != "onnx":
                    metrics[f"{case}_{name}_over_onnx"] = float(np.median(values) / np.median(times["onnx"]))
            metrics[f"{size}_million_parameters"] = millions["ours"]
            if not missing:
                peers["lerobot"][f"{size}_million_parameters"] = millions["lerobot"]
    for name in ("eager", "lerobot"):
        ratios = [value for key, value in metrics.items() if key.endswith(f"_{name}_over_onnx")]
        if ratios:
            metrics[f"worst_{name}_over_onnx"] = min(ratios)
    if missing:
        peers["lerobot"] = {"missing": missing}
    else:
        peers["lerobot"]["version"] = metadata.version("lerobot")
    report(
        "inference",
        seeds=[0],
        budget={"seconds_per_case": given.seconds, "threads": 1, "chunks_at_a_time": 1},
        metrics=metrics,
        peers=peers,
        targets=TARGETS,
        notes=NOTES + (f" LeRobot could not be imported here: {missing}." if missing else ""),
    )


if __name__ == "__main__":
    main()
