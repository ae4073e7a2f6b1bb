"""Kernels take all threads here, also for the small maps of tests."""
import pytest

from conas.engine.native import library


@pytest.fixture(scope="package", autouse=True)
def no_map_is_small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "SMALL", 0)
        yield
