"""The control thread's scheduling: asked for, given back, and never at the cost of what the user set."""

import os
import sys
import threading

import pytest

from hardware.control import realtime

linux = pytest.mark.skipif(sys.platform != "linux", reason="scheduling calls of Linux")


def settings():
    return os.sched_getaffinity(0), realtime.timer_slack(), sys.getswitchinterval(), os.sched_getscheduler(0)


@linux
def test_everything_is_given_back_also_after_an_exception():
    before = settings()
    found = []

    def fail():
        with realtime.control_thread(0, pin=True):
            found.extend((realtime.timer_slack(), sys.getswitchinterval()))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert found[0] == 1
    assert found[1] <= realtime.SWITCH_SECONDS
    assert settings() == before
    with realtime.computing(pin=True):
        pass
    assert settings() == before


@linux
def test_loop_and_inference_find_different_processors():
    cpus = os.sched_getaffinity(0)
    if len(cpus) < 2:
        with realtime.control_thread(0, pin=True), realtime.computing(pin=True):
            assert os.sched_getaffinity(0) == cpus
        return
    with realtime.control_thread(0, pin=True):
        loop = os.sched_getaffinity(0)
    with realtime.computing(pin=True):
        inference = os.sched_getaffinity(0)
    assert len(loop) == 1
    assert inference == cpus - loop
    with realtime.control_thread(0, pin=False), realtime.computing(pin=False):
        assert os.sched_getaffinity(0) == cpus


@linux
def test_a_time_slice_keeps_niceness_and_a_real_time_policy():
    found = {}

    def work():  # settings of one thread: they end with it
        os.setpriority(os.PRIO_PROCESS, 0, 3)
        found["taken"] = realtime.set_time_slice(100_000)
        found["nice"] = os.getpriority(os.PRIO_PROCESS, 0)
        if realtime.request_realtime(1):
            found["beside real time"] = realtime.set_time_slice(100_000)
            found["policy"] = os.sched_getscheduler(0)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found["nice"] == 3
    assert not found.get("beside real time", False)
    assert found.get("policy", os.SCHED_FIFO) == os.SCHED_FIFO
