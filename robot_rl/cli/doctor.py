"""Check this installation: versions, processor, simulation, video, ROS 2, disk; with a remedy for each complaint."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import numpy as np

import robot_rl
from robot_rl.cli.catalog import entries
from robot_rl.core.paths import data_file
from robot_rl.train.progress import say
from robot_rl.train.run import processor

MINIMUM = {
    "torch": (2, 6),
    "mujoco": (3, 17),
    "numba": (0, 61),
    "numpy": (2, 0),
    "pyarrow": (18,),
    "av": (14,),
    "tyro": (1, 0),
}
"""Oldest versions that the code is written for."""

Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    verdict: Verdict
    subject: str
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Config:
    """Settings of ``robot-rl doctor``."""

    strict: bool = False
    """Exit with status 1 for warnings too."""


def run(config: Config) -> int:
    """Print every finding; return 1 if a check failed."""
    verdicts: list[str] = []
    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    for finding in examine():
        verdicts.append(finding.verdict)
        say(f"{finding.verdict:<4}  {finding.subject:<16}  {finding.detail}", style=styles[finding.verdict])
        if finding.remedy and finding.verdict != "ok":
            say(f"      {'':<16}  → {finding.remedy}")
    failed, warned = verdicts.count("fail"), verdicts.count("warn")
    say(f"{verdicts.count('ok')} ok, {warned} to know about, {failed} failed", style="bold")
    return int(failed > 0 or (config.strict and warned > 0))


def examine() -> Iterator[Finding]:
    """Yield the findings of every check, those of plug-ins (entry points ``robot_rl.checks``) included.

    A plug-in's check is a function without arguments that returns ``(verdict, subject, detail, remedy)`` tuples.
    """
    for check in (_python, _versions, _torch, _mujoco, _warp, _video, _packages, _assets, _isaac_gym):
        yield from _guarded(check.__name__.strip("_"), check)
    for name, entry in sorted(entries("checks").items()):
        yield from _guarded(name, lambda entry=entry: (Finding(*row) for row in entry.load()()))  # type: ignore[misc]
    for check in (_terminal, _disk):
        yield from _guarded(check.__name__.strip("_"), check)


def _guarded(name: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """A check that breaks is a finding, and must not hide the others."""
    try:
        yield from check()
    except Exception as error:
        remedy = "Reinstall: pip install -c constraints.txt -e '.[all,test]'"
        yield Finding("fail", name, f"{type(error).__name__}: {error}", remedy)


def _python() -> Iterator[Finding]:
    found = ".".join(map(str, sys.version_info[:3]))
    verdict: Verdict = "ok" if sys.version_info >= (3, 11) else "fail"
    yield Finding(verdict, "python", found, "Python 3.11 or newer is needed")


def _versions() -> Iterator[Finding]:
    for package, oldest in MINIMUM.items():
        try:
            found = metadata.version(package)
        except metadata.PackageNotFoundError:
            yield Finding("fail", package, "not installed", f"pip install -c constraints.txt {package}")
            continue
        numbers = tuple(int(part) for part in found.split("+")[0].split(".")[: len(oldest)] if part.isdigit())
        wanted = ".".join(map(str, oldest))
        old = numbers < oldest
        yield Finding("fail" if old else "ok", package, found, f"{wanted} or newer is needed: pip install -U {package}")


def _torch() -> Iterator[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0))
    threads = torch.get_num_threads()
    yield Finding(
        "ok" if threads <= cores else "warn",
        "processor",
        f"{processor()}, {cores} cores, torch uses {threads} threads",
        f"set OMP_NUM_THREADS={cores}: more threads than cores slow everything down",
    )
    single, half = _matmul_gflops(torch.float32), _matmul_gflops(torch.bfloat16)
    rates = f"bf16 {half:.0f} GFLOP/s against fp32 {single:.0f}"
    detail = f"{rates}: training uses bf16" if half > single else f"{rates}: training stays in fp32"
    yield Finding("ok", "matrix products", detail)
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
        yield Finding("ok", "gpu", f"{name}; networks run on it with --device cuda")
    else:
        yield Finding("ok", "gpu", "none; everything runs on the processor")


def _matmul_gflops(dtype: object, size: int = 1024) -> float:
    import torch

    a = torch.randn(size, size).to(dtype)  # type: ignore[call-overload]
    a @ a
    start = time.perf_counter()
    for _ in range(4):
        a @ a
    return 4 * 2 * size**3 / (time.perf_counter() - start) / 1e9


def _mujoco() -> Iterator[Finding]:
    import mujoco

    model = mujoco.MjModel.from_xml_string(
        "<mujoco><worldbody><body><freejoint/><geom size='.1'/></body></worldbody></mujoco>"
    )
    data = mujoco.MjData(model)
    for _ in range(100):
        mujoco.mj_step(model, data)
    fallen = 0.5 * 9.81 * data.time**2
    right = abs(data.qpos[2] + fallen) < 0.02 * fallen
    detail = f"a ball falls {-data.qpos[2]:.3f} m in {data.time:.1f} s"
    yield Finding("ok" if right else "fail", "physics", detail, f"expected {fallen:.3f} m: reinstall mujoco")


def _warp() -> Iterator[Finding]:
    import warp

    warp.config.log_level = warp.LOG_ERROR
    warp.init()
    devices = ", ".join(str(device) for device in warp.get_devices())
    yield Finding("ok", "rendering", f"ray tracer of mujoco-warp on {devices}; no GL package is needed")


def _video() -> Iterator[Finding]:
    import av

    frames = np.zeros((8, 64, 64, 3), np.uint8)
    frames[:, :, 32:] = 200
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "check.mp4")
        with av.open(path, "w") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.width = stream.height = 64
            stream.pix_fmt = "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        with av.open(path) as container:
            decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    error = float(np.abs(decoded.astype(int) - frames).mean()) if decoded.shape == frames.shape else float("inf")
    good = error < 5
    yield Finding("ok" if good else "fail", "video", f"H.264 written and read back, mean error {error:.1f} of 255")


def _packages() -> Iterator[Finding]:
    """`sim` and `hardware` are common names: another distribution can install over them without a word."""
    root = Path(robot_rl.__file__).resolve().parents[1]
    owners = metadata.packages_distributions()
    for package in ("sim", "hardware"):
        spec = importlib.util.find_spec(package)
        origin = Path(spec.origin).resolve() if spec is not None and spec.origin else None
        others = sorted({name for name in owners.get(package, []) if name.replace("_", "-") != "robot-rl"})
        remedy = f"pip uninstall {' '.join(others) or package}, then install robot-rl again, or use its own environment"
        if origin is None or origin.parent.parent != root:
            yield Finding("fail", f"package {package}", f"is {origin}, not ours", remedy)
        elif others:
            yield Finding("fail", f"package {package}", f"also installed by {', '.join(others)}", remedy)
        else:
            yield Finding("ok", f"package {package}", "ours")


def _assets() -> Iterator[Finding]:
    for kind in ("assets", "launch"):
        files = [file for file in data_file(kind).rglob("*") if file.is_file()]
        yield Finding("ok" if files else "fail", kind, f"{len(files)} files", "reinstall robot-rl")


def _isaac_gym() -> Iterator[Finding]:
    if importlib.util.find_spec("isaacgym") is not None:
        yield Finding("ok", "isaac gym", "importable here")
    else:
        detail = "absent, as expected: it needs Python 3.8 and an NVIDIA GPU; every task here runs on MuJoCo without it"
        yield Finding("ok", "isaac gym", detail)


def _terminal() -> Iterator[Finding]:
    encoding = (sys.stdout.encoding or "").lower()
    if not sys.stderr.isatty():
        yield Finding("ok", "terminal", "none; progress appears as plain lines")
    elif "utf" not in encoding:
        yield Finding("warn", "terminal", f"encoding {encoding}", "export LANG=C.UTF-8")
    else:
        yield Finding("ok", "terminal", f"{shutil.get_terminal_size().columns} columns, live progress")


def _disk() -> Iterator[Finding]:
    place = Path("runs") if Path("runs").exists() else Path()
    free = shutil.disk_usage(place).free / 2**30
    writable = os.access(place, os.W_OK)
    detail = f"{free:.1f} GiB free for {place.resolve().name}/" + ("" if writable else ", not writable")
    verdict: Verdict = "fail" if not writable or free < 0.5 else "warn" if free < 3 else "ok"
    yield Finding(verdict, "disk", detail, "free some space, or work in another directory with --out")
