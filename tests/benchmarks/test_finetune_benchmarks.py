"""Benchmarks of fine-tuning: two rounds of a comparison, figures with the right signs, documents that have a place."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks import finetune_peg, finetune_pusht
from robot_rl.core import registry
from robot_rl.rl.compare.run import Config

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = (str(ROOT / "tests" / "rl" / "fake_commands.py"),)


@dataclass(frozen=True)
class Settings:
    scale: float = 0.1


@pytest.fixture
def config(tmp_path, monkeypatch):
    def finetune(base, env_factory, config: Settings, run):
        raise AssertionError("runs are processes of their own")

    finetune.__annotations__["config"] = Settings
    for name in ("good", "fair", "bad"):
        monkeypatch.setitem(registry._overrides, ("finetuners", name), finetune)
    for name, rate in (("base", 0.5), ("other", 0.4)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "policy.json").write_text(json.dumps({"rate": rate}))
        (tmp_path / name / "model.safetensors").write_bytes(b"")
    return Config(
        tmp_path / "base",
        "toy",
        ("bad", "fair", "good"),
        minutes=1.0,
        out=tmp_path / "out",
        options=("good:scale=0.2", "bad:scale=0.3"),
        demos=tmp_path / "demos",
        demos_for=("bad",),
        other_bases=(f"fair:{tmp_path / 'other'}",),
    )


def ran(config):
    return [json.loads(line)["run"] for line in (config.out / "events.jsonl").read_text().splitlines()]


def test_all_methods_run_once_and_the_best_with_every_seed(config):
    results, spent = finetune_peg.run_in_two_rounds(config, 2, (0, 1, 2), LAUNCHER)
    first, second = ran(config)[:3], ran(config)[3:]
    assert sorted(first) == ["bad 0", "fair 0", "good 0"]
    assert sorted(second) == ["fair 1", "fair 2", "good 1", "good 2"]
    assert {row["method"]: row["seeds"] for row in results["methods"]} == {
        "good": [0, 1, 2],
        "fair": [0, 1, 2],
        "bad": [0],
    }
    assert 0 < spent["core_minutes"] < 5
    again, more = finetune_peg.run_in_two_rounds(config, 2, (0, 1, 2), LAUNCHER)
    assert len(ran(config)) == 7, "nothing is run twice"
    assert again["methods"] == results["methods"]
    assert more["core_minutes"] >= spent["core_minutes"], "time adds up over interruptions"

    found = finetune_peg.margins(results, ("good", "fair", "bad"))
    assert found["good"]["above"] > 0.2
    assert found["bad"]["not_below"] < 0
    assert found["fair"]["above"] > 0.1, "measured from its own base"
    flat = finetune_peg.figures(results)
    assert (flat["base_success"], flat["base_fair_success"], flat["good_seeds"]) == (0.5, 0.4, 3)
    table = finetune_peg.markdown(results)
    assert "| *base* |" in table
    assert "| *base of fair* |" in table
    assert "| good | 3 | 92.0 % |" in table


@pytest.mark.parametrize("name", ["finetune_peg", "finetune_pusht"])
def test_the_documents_have_a_place_for_the_table(config, tmp_path, monkeypatch, name):
    results, _ = finetune_peg.run_in_two_rounds(config, 1, (0,), LAUNCHER)
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "finetuning.md"
    page.write_text((ROOT / "docs" / "finetuning.md").read_text())
    monkeypatch.setattr(finetune_peg, "DOCS", tmp_path / "docs")
    for _ in range(2):
        finetune_peg.write_documents(name, "title", config, results)
    text = page.read_text()
    assert text.count("| good | 1 |") == 1, "written again, not twice"
    assert text.index(f"<!-- {name} -->") < text.index("| good | 1 |") < text.index(f"<!-- end of {name} -->")
    assert (tmp_path / "docs" / "assets" / f"{name}.png").exists()
    assert (config.out / "compare.html").exists()


def test_what_is_measured_is_registered():
    known = set(registry.names("finetuners"))
    methods = {*finetune_peg.ON_POLICY, *finetune_peg.FROM_SCRATCH, *finetune_peg.NEED_DIFFUSION}
    assert methods | set(finetune_peg.USE_DEMONSTRATIONS) | set(finetune_peg.OPTIONS) <= known
    assert set(finetune_pusht.SETTINGS) <= known
