"""Methods side by side: the same base, task, budget and seeds, then one test on the same fresh episodes.

<out>/comparison.json               what all runs have in common; a change is refused
      runs/<method>/seed_<k>/       a run of ``robot-rl finetune``, with test.json beside it once it is finished
      base/, base_<method>/         the test of the policies that were improved
      logs/                         what the processes said
      compare.json, .html, .png     what came of it
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from robot_rl.core import registry
from robot_rl.core.errors import ConfigError, DataError, UnknownNameError
from robot_rl.core.ranges import require_range
from robot_rl.rl.compare.cluster import RayPlaces
from robot_rl.rl.compare.files import fingerprint, read_test, watch
from robot_rl.rl.compare.jobs import Ended, Job, LocalPlaces, Places, run_jobs
from robot_rl.rl.compare.results import Curve, SeedResult, summarise
from robot_rl.rollout.evaluate import TEST_SEED
from robot_rl.train.progress import say
from robot_rl.train.run import alone, differences, processor, read_metrics, to_plain, write_json

LAUNCHER = ("-m", "robot_rl.cli.main")
"""Arguments of the interpreter that lead to our commands."""


@dataclass(frozen=True)
class Config:
    """Settings of ``robot-rl compare``."""

    policy: Path
    """Checkpoint of the policy that every method improves."""
    task: str
    """Task to improve it in (`robot-rl list tasks`)."""
    methods: tuple[str, ...]
    """Methods (`robot-rl list finetuners`); method@label is the same method with options of its own."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds of every method; several show how much luck there is."""
    minutes: float = 0.0
    """Wall-clock minutes of every run, validation included. Without any limit it is 10 minutes."""
    steps: int = 0
    """Environment steps of every run, over all lanes; 0 for no limit."""
    options: tuple[str, ...] = ()
    """Settings of a method as method:name=value, for example: residual:lanes=128 dsrl:core.critics=2."""
    reward: str = "sparse"
    """Reward of the task while learning: sparse or shaped."""
    demos: Path | None = None
    """Demonstrations for the methods that use them."""
    demos_for: tuple[str, ...] = ()
    """Methods that are given the demonstrations; all where none is named."""
    other_bases: tuple[str, ...] = ()
    """Another base for a method that cannot take the common one, as method:checkpoint. It is tested as well."""
    evaluations: int = 8
    """Validations spread over every run, after the one at the start: the points of the curves."""
    eval_episodes: int = 100
    """Episodes per validation."""
    test_episodes: int = 200
    """Fresh episodes that base and results are tested on, the same for all."""
    test_seed: int = TEST_SEED
    """First episode seed of the test."""
    out: Path = Path("runs/compare")
    """Directory of everything that the comparison makes; the same command in the same directory goes on."""
    device: str = "cpu"
    """Where networks run: cpu, cuda, cuda:1; all runs share it."""
    jobs: int = 0
    """Runs at once; 0 for one per processor. Each has its share of the processors."""
    cluster: bool = False
    """Run on a Ray cluster, whose machines must see the same files."""
    address: str = ""
    """Address of the cluster; by default that of RAY_ADDRESS, or else one is started on this machine."""

    def __post_init__(self) -> None:
        require_range(self, "minutes", "steps", "evaluations", "test_seed", "jobs")
        require_range(self, "eval_episodes", "test_episodes", low=1)
        if self.seeds and min(self.seeds) < 0:
            raise ConfigError(f"seeds must be at least 0, got {min(self.seeds)}")


_FREE = ("methods", "seeds", "options", "other_bases", "demos", "demos_for", "out", "jobs", "cluster", "address")
"""Settings that may differ when a comparison goes on; what a single run depends on is checked run by run."""


@dataclass(frozen=True)
class _Run:
    """One method with one seed."""

    method: str
    """As given: with the label of a variant."""
    seed: int
    path: Path
    base: str
    """Name of the base that it starts from."""
    settings: dict[str, Any]
    """What its result depends on beyond what all have in common."""
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.method} seed {self.seed}"

    @property
    def best(self) -> Path:
        return self.path / "checkpoints" / "best"

    @property
    def stamp(self) -> Path:
        """Present once the run is finished."""
        return self.path / "finished.json"

    @property
    def test(self) -> Path:
        return self.path / "test.json"


class Comparison:
    """A comparison in its directory.

    Args:
        config: what to compare.
        launcher: arguments of the interpreter that lead to our commands, for a caller with tasks of its own.

    Raises:
        ConfigError: a setting cannot work, or the directory holds another comparison.
        UnknownNameError: no such method or option.
        DataError: no checkpoint where one should be.
    """

    def __init__(self, config: Config, launcher: Sequence[str] = LAUNCHER) -> None:
        self.config, self.launcher = config, tuple(launcher)
        self.minutes = config.minutes if config.minutes or config.steps else 10.0
        if not config.methods or not config.seeds:
            raise ConfigError(f"which methods? --methods some of: {', '.join(registry.names('finetuners'))}")
        self.options = _by_method("option", config.options, config.methods)
        self.bases = {"base": config.policy}
        for method, paths in _by_method("base", config.other_bases, config.methods).items():
            self.bases[f"base_{method}"] = Path(paths[-1])
        if self.launcher == LAUNCHER and registry.task_family(config.task) not in registry.names("tasks"):
            raise UnknownNameError("task", config.task, registry.names("tasks"))
        self._check_methods()
        self.common = self._common()
        self.runs = [self._run(method, seed) for seed in config.seeds for method in config.methods]
        self.errors: dict[str, str] = {}
        """Why runs failed, by their name."""

    def execute(self, places: Places | None = None) -> dict[str, Any]:
        """Run what is missing and return the results, which are also in ``compare.json``.

        A run that fails is reported and does not stop the others; it is tried again when the comparison goes on.
        """
        with alone(self.config.out):
            self._open()
            jobs = [self._base_job(name) for name in self.bases if not self._base_test(name).exists()]
            jobs += [job for run in self.runs if (job := self._next_job(run))]
            kept = sum(run.test.exists() for run in self.runs)
            if kept:
                say(f"Kept from before: {kept} of {len(self.runs)} runs", style="dim")
            if jobs:
                places = places or self._places()
                write_json(self.config.out / "machine.json", {"processor": processor(), "runs_at_once": places.count})
                run_jobs(jobs, places, self._ended)
            results = self.results()
            write_json(self.config.out / "compare.json", results)
        return results

    def results(self) -> dict[str, Any]:
        """Return what has been measured so far."""
        missing = [name for name in self.bases if not self._base_test(name).exists()]
        if missing:
            why = "; ".join(f"{name}: {self.errors[name]}" for name in missing if name in self.errors)
            raise DataError(f"the base could not be tested: {why or 'it has not been tried'}")
        bases = {name: read_test(self._base_test(name)) for name in self.bases}
        finished = [self._result(run) for run in self.runs if run.test.exists()]
        summary = summarise(
            methods=self.config.methods,
            bases=bases,
            base_of={run.method: run.base for run in self.runs},
            results=finished,
            errors=self._errors_by_method(),
        )
        budget = {"minutes": self.minutes, "steps": self.config.steps}
        test = {"first_seed": self.config.test_seed, "episodes": self.config.test_episodes}
        machine = self.config.out / "machine.json"
        facts = {"machine": json.loads(machine.read_text(encoding="utf-8")) if machine.exists() else {}, "test": test}
        return {"settings": self.common, "budget": budget, **facts, "options": self.options, **summary}

    def _check_methods(self) -> None:
        from robot_rl.rl.options import config_class, override

        twice = {method for method in self.config.methods if self.config.methods.count(method) > 1}
        if twice:
            raise ConfigError(f"named twice: {', '.join(sorted(twice))}; a variant is called method@label")
        for method in self.config.methods:
            finetune = registry.load("finetuners", method.partition("@")[0])
            override(config_class(finetune)(), self.options.get(method, ()))
        unknown = [method for method in self.config.demos_for if method not in self.config.methods]
        if unknown:
            raise UnknownNameError("method", unknown[0], self.config.methods)

    def _common(self) -> dict[str, Any]:
        """Return what all runs have in common."""
        given = {f.name: getattr(self.config, f.name) for f in fields(self.config) if f.name not in _FREE}
        # The place of a checkpoint may change; what is in it may not.
        given |= {"minutes": self.minutes, "policy": fingerprint(self.config.policy)}
        plain: dict[str, Any] = to_plain(given)
        return plain

    def _open(self) -> None:
        record = self.config.out / "comparison.json"
        if record.exists():
            found = differences(json.loads(record.read_text(encoding="utf-8")), self.common)
            if found:
                raise ConfigError(
                    f"{self.config.out} holds another comparison: {'; '.join(found)}; choose another --out"
                )
        write_json(record, self.common)
        for run in self.runs:
            if run.stamp.exists():
                found = differences(json.loads(run.stamp.read_text(encoding="utf-8"))["settings"], run.settings)
                if found:
                    raise ConfigError(
                        f"{run.path} was made with other settings: {'; '.join(found)}; "
                        f"compare them side by side as {run.method}@label, or choose another --out"
                    )

    def _run(self, method: str, seed: int) -> _Run:
        config, name = self.config, method.partition("@")[0]
        path = config.out / "runs" / method / f"seed_{seed}"
        base = f"base_{method}" if f"base_{method}" in self.bases else "base"
        options = self.options.get(method, [])
        demonstrated = config.demos is not None and (not config.demos_for or method in config.demos_for)
        arguments = [
            "finetune", "--policy", str(self.bases[base]), "--task", config.task, "--method", name,
            "--reward", config.reward, "--seed", str(seed), "--out", str(path), "--resume",
            "--evaluations", str(config.evaluations), "--eval-episodes", str(config.eval_episodes),
            "--minutes", str(self.minutes), "--steps", str(config.steps), "--device", config.device,
        ]  # fmt: skip
        arguments += ["--demos", str(config.demos)] if demonstrated else []
        arguments += ["--options", *options] if options else []
        settings = {
            "options": options,
            "base": fingerprint(self.bases[base]),
            "demonstrations": str(config.demos) if demonstrated else "",
        }
        return _Run(method, seed, path, base, settings, (*self.launcher, *arguments))

    def _next_job(self, run: _Run) -> Job | None:
        """Return what is to be done next for ``run``: learn, test, or nothing."""
        if run.test.exists():
            return None
        logs = self.config.out / "logs"
        if run.stamp.exists():
            return self._test_job(f"test {run.name}", run.best, run.test)
        total, unit = (int(60 * self.minutes), "second") if self.minutes else (self.config.steps, "step")
        return Job(
            run.name, run.arguments, logs / f"{run.name}.log".replace(" ", "_"), total, unit, watch(run.path, unit)
        )

    def _test_job(self, name: str, checkpoint: Path, result: Path) -> Job:
        config = self.config
        arguments = (
            *self.launcher, "eval", "--policy", str(checkpoint), "--task", config.task,
            "--episodes", str(config.test_episodes), "--seeds", str(config.test_seed), "--json", str(result),
        )  # fmt: skip
        return Job(name, arguments, config.out / "logs" / f"{name}.log".replace(" ", "_"), 1, "test")

    def _base_test(self, name: str) -> Path:
        return self.config.out / name / "test.json"

    def _base_job(self, name: str) -> Job:
        self._base_test(name).parent.mkdir(parents=True, exist_ok=True)
        return self._test_job(f"test {name}", self.bases[name], self._base_test(name))

    def _ended(self, job: Job, end: Ended) -> list[Job]:
        """Note how a job ended; a run that has learned is tested next."""
        subject = job.name.removeprefix("test ")
        if end.error:
            self.errors[subject] = end.error
            say(f"{job.name} failed: {end.error} (all it said: {job.log})", style="red")
            return []
        run = next((run for run in self.runs if run.name == job.name), None)
        if run is None:
            return []
        write_json(run.stamp, {"settings": run.settings})
        following = self._next_job(run)
        return [following] if following else []

    def _errors_by_method(self) -> dict[str, str]:
        return {run.method: self.errors[run.name] for run in self.runs if run.name in self.errors}

    def _result(self, run: _Run) -> SeedResult:
        rows = read_metrics(run.path, "eval")
        curve = Curve(*([float(row[key]) for row in rows] for key in ("step", "seconds", "success")))
        last = (read_metrics(run.path, "finetune") or rows)[-1]
        return SeedResult(run.method, run.seed, read_test(run.test), int(last["step"]), float(last["seconds"]), curve)

    def _places(self) -> Places:
        if self.config.cluster:
            return RayPlaces(self.config.jobs, self.config.address)
        return LocalPlaces(self.config.jobs)


def _by_method(kind: str, texts: Sequence[str], methods: Sequence[str]) -> dict[str, list[str]]:
    """Sort ``method:value`` texts by method."""
    found: dict[str, list[str]] = {}
    for text in texts:
        method, separator, value = text.partition(":")
        if not separator:
            raise ConfigError(f"'{text}' is no {kind} of a method: expected method:value")
        if method not in methods:
            raise UnknownNameError("method", method, methods)
        found.setdefault(method, []).append(value)
    return found
