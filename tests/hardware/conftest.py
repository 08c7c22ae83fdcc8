"""Lets the tests of this room import their rigs, and gives those that need it a ROS 2 domain of their own."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module")
def ros_domain(new_domain):
    """A domain of our own on this machine only, inherited by child processes."""
    from hardware.ros.context import prepare_environment

    saved = dict(os.environ)
    for name in ("ROS_AUTOMATIC_DISCOVERY_RANGE", "FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE"):
        os.environ.pop(name, None)
    number = new_domain()
    prepare_environment(number)
    yield number
    os.environ.clear()
    os.environ.update(saved)
