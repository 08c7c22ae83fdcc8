"""Lets colcon build robot_rl as a ROS 2 package (ament_python); pip reads pyproject.toml alone.

Metadata and entry points come from pyproject.toml here too. What is added is what ROS 2 looks for: the package's marker
in the ament index, ``share/robot_rl`` with the launch files, and ``lib/robot_rl`` with what ``ros2 run`` starts.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
AMENT = Path("launch") / "ament"
MARKER = AMENT / "share" / "ament_index" / "resource_index" / "packages" / "robot_rl"


class BuildWithData(build_py):
    """Puts the data files of the project where `robot_rl.core.paths` looks for them."""

    def run(self) -> None:
        """Build the packages, and copy ``assets`` and ``launch`` into them."""
        super().run()
        if not self.editable_mode:
            for kind in ("assets", "launch"):
                shutil.copytree(HERE / kind, Path(self.build_lib) / "robot_rl" / "_data" / kind, dirs_exist_ok=True)


class PlainDistribution(Distribution):
    """Holds the supported Python versions as text: colcon passes on what it reads here as a Python literal."""

    def parse_config_files(self, *arguments: object, **options: object) -> None:
        """Read pyproject.toml and setup.cfg."""
        super().parse_config_files(*arguments, **options)
        self.python_requires = self.metadata.python_requires = str(self.python_requires)


def files(directory: Path, pattern: str = "*") -> list[str]:
    """Return the files in ``directory``, relative to the project, as setuptools wants them."""
    return sorted(str(path.relative_to(HERE)) for path in (HERE / directory).glob(pattern) if path.is_file())


setup(
    packages=find_packages(include=["robot_rl", "robot_rl.*", "sim", "sim.*", "hardware", "hardware.*"]),
    distclass=PlainDistribution,
    cmdclass={"build_py": BuildWithData},
    data_files=[
        (str(MARKER.parent.relative_to(AMENT)), [str(MARKER)]),
        ("share/robot_rl", ["package.xml"]),
        ("share/robot_rl/launch", files(Path("launch"), "*.yaml")),
        ("share/robot_rl/launch/params", files(Path("launch/params"))),
        ("lib/robot_rl", files(AMENT / "lib" / "robot_rl")),
    ],
)
