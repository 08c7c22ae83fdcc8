import pytest

from robot_rl.core.clock import Rate


class Time:
    """A clock that only moves when told."""

    def __init__(self):
        self.now = 100.0

    def sleep(self, seconds):
        self.now += seconds

    def rate(self, hz):
        return Rate(hz, now=lambda: self.now, sleep=self.sleep)


def test_deadlines_are_absolute_so_lateness_does_not_accumulate():
    time = Time()
    rate = time.rate(10)
    for tick in range(1, 6):
        time.now += 0.03  # work
        assert rate.wait() == pytest.approx(0.0, abs=1e-9)
        assert time.now == pytest.approx(100 + 0.1 * tick)
    assert rate.missed == 0


def test_a_short_overrun_is_lateness_and_a_long_one_a_missed_tick():
    time = Time()
    rate = time.rate(10)
    time.now += 0.12
    assert rate.wait() == pytest.approx(0.02)
    assert rate.missed == 0
    time.now += 0.35  # at 100.47: the deadline 100.2 and its successor have passed
    assert rate.wait() == pytest.approx(0.07, abs=1e-6)
    assert rate.missed == 2
    rate.wait()
    assert time.now == pytest.approx(100.5)


def test_a_rate_must_be_positive():
    with pytest.raises(ValueError, match="positive"):
        Rate(0)
