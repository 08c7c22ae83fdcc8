"""Code blocks of the documentation run.

A block runs if the line before it is ``<!-- run -->``. ``<!-- run: "--steps 40000" -> "--steps 20", "200" -> "2" -->``
runs it with the given replacements, so that a reader sees the real numbers and the test takes seconds. The blocks of
one file run in order in one empty directory.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
BLOCK = re.compile(r"^<!-- run(?::(?P<swaps>.*?))? -->\n```(?P<language>bash|python)\n(?P<code>.*?)^```", re.M | re.S)
SWAP = re.compile(r'"([^"]*)" -> "([^"]*)"')
LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)#\s]+)")


def blocks(page: Path) -> list[tuple[str, str]]:
    found = []
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        code = match["code"]
        for old, new in SWAP.findall(match["swaps"] or ""):
            assert old in code, f"{page.name}: nothing to replace for {old!r}"
            code = code.replace(old, new)
        found.append((match["language"], code))
    return found


@pytest.mark.slow
@pytest.mark.ros
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_the_blocks_run(page, tmp_path, new_domain):
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "ROBOT_RL_DEBUG": "1",
        "ROS_DOMAIN_ID": str(new_domain()),
    }
    for language, code in blocks(page):
        command = ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else [sys.executable, "-c", code]
        result = subprocess.run(
            command,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=400,
            stdin=subprocess.DEVNULL,
        )
        assert result.returncode == 0, f"{page.name}:\n{code}\n{result.stdout[-2000:]}{result.stderr[-4000:]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    missing = [
        target for target in LINK.findall(page.read_text(encoding="utf-8")) if not (page.parent / target).exists()
    ]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_is_shown_exists(page):
    from robot_rl.cli.catalog import entries

    shown = set(re.findall(r"^(?:\$ )?robot-rl ([a-z]+)", page.read_text(encoding="utf-8"), re.M))
    assert shown <= set(entries("commands"))
    targets = set(re.findall(r"^make ([a-z-]+)", page.read_text(encoding="utf-8"), re.M))
    assert targets <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
