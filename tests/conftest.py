"""What all tests share: one thread for torch, whose pool only slows tiny models down, and no deadlines.

Whatever cluster the shell or the machine has, tests start their own.

A property that takes longer than usual on a busy machine is no less true.
"""

import os

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["RAY_ADDRESS"] = "local"
settings.register_profile("supmer", deadline=None)
settings.load_profile("supmer")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """With several processes, all tests that want Ray share one of them and its cluster; the others run beside it."""
    for item in items:
        if item.path.parent.name in ("integration", "e2e"):
            item.add_marker(pytest.mark.xdist_group("ray"))
