"""The frame of the benchmarks: what is kept, what counts as met, and what must not be in a result."""

import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is no package of the distribution

from benchmarks import common, table  # noqa: E402

KEYS = {"name", "date", "commit", "machine", "versions", "seeds", "budget", "metrics", "peers", "targets", "met"}
KEPT = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    return tmp_path


def test_a_result_is_kept_and_printed(results, capsys):
    common.report(
        "example",
        seeds=[0, 1],
        budget={"seconds": 3},
        metrics={"ratio": 2.6123456789, "error": 0.5, "steps": 7},
        peers={"other": 1.0},
        targets={"ratio": (">=", 2.5), "error": ("<=", 0.4), "absent": (">=", 1.0)},
    )
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("RESULT ")
    kept = json.loads((results / "example.json").read_text())
    assert kept == json.loads(line.removeprefix("RESULT "))
    assert set(kept) >= KEYS
    assert kept["met"] == {"ratio": True, "error": False, "absent": False}
    assert kept["targets"]["ratio"] == [">=", 2.5]
    assert kept["machine"]["cores"] >= 1


def test_a_value_that_is_not_finite_meets_no_target(results):
    kept = common.report("nan", seeds=0, budget="", metrics={"x": float("nan")}, targets={"x": ("<=", 1.0)})
    assert kept["met"] == {"x": False}


def test_processor_time_counts_threads_children_and_not_sleep():
    with common.measure() as asleep:
        time.sleep(0.2)
    assert asleep.wall >= 0.2
    assert asleep.cpu < 0.1
    with common.measure() as busy:
        subprocess.run([sys.executable, "-c", "sum(i * i for i in range(3_000_000))"], check=True)
    assert busy.cpu > 0.05


def test_the_table_says_what_was_missed(results):
    common.report(
        "speed", seeds=0, budget="", metrics={"extra": 1.0, "ratio": 0.8}, targets={"ratio": (">=", 0.9)}, notes="Why."
    )
    text = table.table()
    (row,) = (line for line in text.splitlines() if line.startswith("| [speed](../benchmarks/results/speed.json)"))
    assert "| ratio | 0.8 | >= 0.9 | **no** |" in row
    assert "**speed.** Why." in text


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_kept_results_are_complete_and_name_no_machine(path):
    kept = json.loads(path.read_text())
    assert set(kept) >= KEYS
    assert kept["name"] == path.stem
    assert (ROOT / "benchmarks" / f"{path.stem}.py").exists()
    for metric, (comparison, bound) in kept["targets"].items():
        value = kept["metrics"].get(metric)
        assert kept["met"][metric] == (value is not None and common._COMPARE[comparison](value, bound))
    text = path.read_text()
    assert socket.gethostname() not in text or len(socket.gethostname()) < 4
    assert not re.search(r"""[\s"'=(]/\w+/\w""", text), "a path of the machine"


def test_the_table_in_the_documents_is_current():
    page = table.PAGE.read_text(encoding="utf-8")
    shown = page.partition(table.BEGIN)[2].partition(table.END)[0].strip()
    assert shown == table.table().strip(), "run: make bench-table"
