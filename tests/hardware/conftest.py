"""Lets the tests of this room import their rigs, and gives those that need it a ROS 2 domain of their own."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def new_domain():
    """Return a free domain at each call, from ids that the tests running beside these do not choose from."""
    from hardware.ros.context import MAX_DOMAIN, free_domain

    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    return lambda: free_domain(range(1 + worker, MAX_DOMAIN + 1, workers))


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
