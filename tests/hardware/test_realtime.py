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


@linux
def test_threads_that_share_the_interpreter_with_the_loop_have_the_priority_below():
    stop, found = threading.Event(), {}

    def start(kind):
        ready = threading.Event()
        thread = kind(target=lambda: (ready.set(), stop.wait(10.0)), daemon=True)
        thread.start()
        assert ready.wait(5.0)
        return thread

    def scheduling(thread):
        return os.sched_getscheduler(thread.native_id), os.sched_getparam(thread.native_id).sched_priority

    def loop():  # a thread of its own, whose settings end with it
        with realtime.control_thread(30, pin=False):
            threads["later"] = start(realtime.MessengerThread)
            found["granted"] = os.sched_getscheduler(0) == os.SCHED_FIFO
            found["meanwhile"] = {name: scheduling(thread) for name, thread in threads.items()}
        found["after"] = {name: scheduling(thread) for name, thread in threads.items() if name != "later"}
        found["later"] = scheduling(threads["later"])

    normal, raised = (os.SCHED_OTHER, 0), (os.SCHED_FIFO, 29)
    threads = {"messenger": start(realtime.MessengerThread), "other": start(threading.Thread)}
    try:
        runner = threading.Thread(target=loop)
        runner.start()
        runner.join(10.0)
        expected = raised if found["granted"] else normal
        assert found["meanwhile"] == {"messenger": expected, "other": normal, "later": expected}
        assert found["after"] == {"messenger": normal, "other": normal}
        assert found["later"] == normal
    finally:
        stop.set()
        for thread in threads.values():
            thread.join(5.0)
    assert not realtime.MessengerThread._running
