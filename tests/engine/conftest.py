"""Kernels take all threads here, also for the small maps of tests and on a machine that is busy."""
import pytest

from conas.engine.native import library
from conas.engine.native.cores import Cores


@pytest.fixture(scope="package", autouse=True)
def all_threads():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "SMALL", 0)
        patch.setattr(library, "cores", Cores(waited=lambda: None))
        yield
