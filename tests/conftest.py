"""Gives tests that start ROS 2 processes a domain of their own."""

import socket

import pytest


@pytest.fixture(scope="session")
def new_domain():
    """Return, at each call, a ROS 2 domain that nothing on this machine uses; it stays taken until the tests end.

    A domain looks free until its first process is up. Until then, and between the processes of one test, it is claimed:
    by the last UDP port of its range, which only its 120th process would bind. Other tests of this machine see that,
    those of another run included.
    """
    from hardware.ros.context import MAX_DOMAIN, free_domain

    claims = []
    left = set(range(1, MAX_DOMAIN + 1))

    def new():
        while True:
            number = free_domain(left)
            left.remove(number)
            claim = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            claims.append(claim)
            try:
                claim.bind(("127.0.0.1", 7400 + 250 * number + 249))
            except OSError:
                continue
            return number

    yield new
    for claim in claims:
        claim.close()
