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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With several processes, all tests that want Ray share one of them and its cluster; the others run beside it."""
    from xdist.scheduler import LoadScopeScheduling

    class RayInOne(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return "ray" if nodeid.startswith(("tests/integration/", "tests/e2e/")) else nodeid.partition("::")[0]

    return RayInOne(config, log)
