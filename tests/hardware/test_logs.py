"""The log of a control process: no reader, however slow, holds up who logs."""

import logging
import subprocess
import sys
import threading
import time

import pytest

from hardware.control.logs import DeferredHandler


class Reader:
    """Takes lines only while its gate is open."""

    def __init__(self):
        self.gate, self.asked, self.lines = threading.Event(), threading.Event(), []

    def __call__(self, line):
        self.asked.set()
        self.gate.wait(20.0)
        self.lines.append(line)


@pytest.fixture
def reader():
    made = Reader()
    yield made
    made.gate.set()


def until(true, patience=10.0):
    deadline = time.monotonic() + patience
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def logger_of(handler):
    logger = logging.Logger("loop")
    logger.addHandler(handler)
    return logger


def test_a_reader_that_stands_still_holds_nobody_up_and_learns_what_it_missed(reader):
    handler = DeferredHandler(reader, room=10)
    logger = logger_of(handler)
    logger.warning("tick 0")
    assert reader.asked.wait(5.0)
    begun = time.monotonic()
    for k in range(1, 500):
        logger.warning("tick %d", k)
    assert time.monotonic() - begun < 1.0
    reader.gate.set()
    handler.close()
    assert reader.lines[:2] == ["tick 0\n", "489 lines of the log were lost here: nobody took them\ntick 1\n"]
    assert reader.lines[2:] == [f"tick {k}\n" for k in range(2, 11)]


def test_a_full_disk_costs_the_lines_of_its_time_and_no_others():
    full, written = threading.Event(), []

    def write(text):
        if full.is_set():
            raise OSError(28, "No space left on device")
        written.append(text)

    handler = DeferredHandler(write)
    logger = logger_of(handler)
    logger.warning("before")
    until(lambda: written)
    full.set()
    for _ in range(3):
        logger.warning("lost")
    until(lambda: handler.lost == 3)
    full.clear()
    logger.warning("after")
    handler.close()
    assert written == ["before\n", "3 lines of the log were lost here: nobody took them\nafter\n"]


def test_ending_does_not_wait_for_a_reader_that_never_comes(reader):
    handler = DeferredHandler(reader, room=2)
    for _ in range(5):
        logger_of(handler).warning("tick")
    begun = time.monotonic()
    handler.close()
    assert time.monotonic() - begun < 5.0


def test_a_traceback_is_written_with_its_line():
    lines = []
    handler = DeferredHandler(lines.append)
    try:
        raise ValueError("the bus is gone")
    except ValueError:
        logger_of(handler).exception("exception in the driver")
    handler.close()
    assert len(lines) == 1
    assert lines[0].startswith("exception in the driver\nTraceback")
    assert lines[0].endswith("ValueError: the bus is gone\n")


LOOP = """
import logging
from hardware.control.logs import start_log
start_log(logging.INFO, "%(asctime)s %(levelname)s %(message)s")
for k in range(20_000):
    logging.getLogger("loop").info("tick %d of a loop that says much", k)
print("through", flush=True)
"""


def test_a_process_whose_pipe_nobody_reads_goes_on_and_ends():
    process = subprocess.Popen([sys.executable, "-c", LOOP], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "through\n", "its standard error, of 64 KiB, has long been full"
        assert process.wait(20.0) == 0
    finally:
        process.kill()
        _, written = process.communicate()
    assert " INFO tick 0 of a loop" in written.splitlines()[0]
