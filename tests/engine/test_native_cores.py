"""Threads that have to wait for cores, counted beside a process that keeps a core busy, and what follows from it."""
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from conas.engine.native import library
from conas.engine.native.cores import LONGEST, REST, WINDOW, Cores, waited

BUSY = "print('busy', flush=True)\nwhile True: pass"


@pytest.fixture
def one_core():
    """This process, and those that it starts, on one core."""
    if not hasattr(os, "sched_setaffinity") or waited() is None:
        pytest.skip("nobody counts here how long threads wait")
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    yield
    os.sched_setaffinity(0, cores)


def work(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


def test_waiting_for_a_core_is_counted_and_sleeping_is_not(one_core):
    before = waited()
    time.sleep(0.2)
    assert waited() - before < 0.1
    busy = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE)
    try:
        busy.stdout.readline()
        before = waited()
        thread = threading.Thread(target=work, args=(1,))
        thread.start()
        work(1)
        in_all = waited() - before  # the thread may have ended, and what it waited is then lost
        thread.join()
    finally:
        busy.kill()
        busy.communicate()
    assert in_all > 0.4  # of the 1 s, at most about a half was ours, and both threads shared it


def test_one_thread_beside_a_busy_process_and_all_again_after_it(one_core):
    cores = Cores()
    busy = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE)
    try:
        busy.stdout.readline()
        answers = set()
        until = time.monotonic() + 30
        while True not in answers and time.monotonic() < until:
            answers.add(cores.crowded())
    finally:
        busy.kill()
        busy.communicate()
    assert answers == {False, True}
    until = time.monotonic() + 2 * LONGEST
    while cores.crowded():
        assert time.monotonic() < until
        time.sleep(0.01)


class Machine:
    """A clock, and threads that wait a given share of the time."""

    def __init__(self):
        self.time, self.waits, self.looks = 5.0, 70.0, 0

    def clock(self) -> float:
        return self.time

    def waited(self) -> float:
        self.looks += 1
        return self.waits

    def run(self, cores: Cores, seconds: float, share: float, step: float = 0.001) -> float:
        """The share of the time in which the answer is True. One thread alone does not wait."""
        alone = 0
        for _ in range(round(seconds / step)):
            self.time += step
            if cores.crowded():
                alone += 1
            else:
                self.waits += step * share
        return alone * step / seconds


def test_an_idle_machine_is_never_crowded_and_seldom_looked_at():
    machine = Machine()
    cores = Cores(machine.clock, machine.waited)
    assert machine.run(cores, 10, 0.1) == 0
    assert machine.looks <= 10 / WINDOW + 1


def test_all_threads_are_tried_ever_more_seldom_while_they_have_to_wait():
    machine = Machine()
    cores = Cores(machine.clock, machine.waited)
    assert machine.run(cores, 10, 0.5) > 0.85
    assert machine.run(cores, 100, 0.5) > 0.94  # a window in each LONGEST
    assert machine.run(cores, 2 * LONGEST, 0) < 0.55  # found to be idle at the next look
    assert machine.run(cores, 10, 0) == 0
    machine.run(cores, 2 * WINDOW, 0.5)
    assert cores.rest == 2 * REST  # after an idle time, the first rest is short again


def test_where_nobody_counts_all_threads_are_used():
    cores = Cores(waited=lambda: None)
    assert not cores.crowded()
    assert not cores.crowded()


def test_kernels_ask(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(library, "cores", Cores(machine.clock, machine.waited))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    seen = set()
    for _ in range(200):
        machine.time += 0.001
        machine.waits += 0.0005
        seen.add(library.threads(10**6))
    assert seen == {1, 2}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    looks = machine.looks
    machine.time += 100
    assert library.threads(10**6) == 1
    assert machine.looks == looks  # with one thread there is nothing to ask
