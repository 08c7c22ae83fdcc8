"""The page on robots, cameras and operator devices says of each of them whether it has met real hardware."""

from importlib.metadata import entry_points
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "robots.md"
DASH = "\N{EN DASH}"
SIMULATED = {"sim", "fake", "task", "script"}
"""What no hardware belongs to."""


def rows():
    """Return for each name in the first cell of the page's table: the last cell, real hardware."""
    found = {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `"):
            assert len(cells) == 6, line
            found.setdefault(cells[0].strip("`"), []).append(cells[-1])
    return found


@pytest.mark.parametrize("group", ["robots", "cameras", "teleop"])
def test_the_table_has_every_device_and_says_whether_it_met_real_hardware(group):
    table, names = rows(), [entry.name for entry in entry_points(group=f"robot_rl.{group}")]
    missing = [name for name in names if name not in table]
    assert not missing, f"{PAGE.name} lacks {', '.join(missing)}"
    assert table["--console"] == ["none"]
    for name in names:
        assert all((cell == DASH) == (name in SIMULATED) and cell for cell in table[name]), name
