"""Has every thread of this process a core? Where not, one thread is faster than several that wait for each other.

A parallel loop ends with its last thread. Beside a process that keeps a core busy, a thread may not run for
milliseconds, and an iteration of second-order search has thousands of loops. Linux counts how long each thread was
ready to run and had no core; this is read some twenty times a second. Kernels compute the same bits by any number of
threads, so their number may change at any time.
"""
import math
import os
import time
from collections.abc import Callable

TASKS = "/proc/self/task"
WINDOW, SHARE = 0.05, 0.2  # seconds from one look to the next; crowded if threads had to wait for this share of them
REST, LONGEST = 0.1, 1.0  # seconds until all threads are tried again, at first and at most


def waited() -> float | None:
    """Seconds that threads of this process were ready to run and had no core, in all. None where nobody counts them."""
    nanoseconds = 0
    try:
        for task in os.listdir(TASKS):
            try:
                with open(f"{TASKS}/{task}/schedstat", "rb") as file:
                    nanoseconds += int(file.read().split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue  # a thread that has just ended
    except (OSError, IndexError, ValueError):
        return None
    return nanoseconds / 1e9


class Cores:
    """Whether threads of this process have to wait for cores. `clock` and `waited` return seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, waited: Callable[[], float | None] = waited):
        self.clock, self.waited = clock, waited
        self.last, self.before = -math.inf, 0.0  # when the last look was, and what it saw
        self.until, self.rest, self.answer = 0.0, REST, False

    def crowded(self) -> bool:
        """Whether to use one thread for now. Cheap: it is asked before every kernel."""
        now = self.clock()
        if now >= self.until:
            waits = self.waited()
            if waits is None:
                self.until = math.inf
                return False
            tried = not self.answer  # if not, only one thread was at work since, and all get a window again
            self.answer = tried and waits - self.before > SHARE * (now - self.last)
            self.until = now + (self.rest if self.answer else WINDOW)
            if tried:
                self.rest = min(LONGEST, 2 * self.rest) if self.answer else REST
            self.last, self.before = now, waits
        return self.answer
