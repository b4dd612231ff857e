"""What all tests share: one thread for torch, whose pool only slows tiny models down, and no deadlines.

Whatever cluster the shell or the machine has, tests start their own.

A property that takes longer than usual on a busy machine is no less true.
"""

import os

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where a test asks for more threads: those that wait for each other must sleep. They spin otherwise, and beside another
# busy process they took the cores from those that they waited for: steps were ten times slower on two cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["RAY_ADDRESS"] = "local"

import torch  # reads the lines above when it is imported

# Where there is no GPU, its kernels are interpreted. Triton reads this when it is first imported, by whomever.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# The tests' own servers are never behind a proxy.
for name in ("NO_PROXY", "no_proxy"):
    os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost"]))
# Whether a check of everyone's passes does not hang on which examples are drawn today; a developer's look further.
settings.register_profile("supmer", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("supmer")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With several processes, all tests that share a cluster run in one of them, and the others beside it.

    Those of the whole way start clusters of their own, in processes of their own. Both kinds take longest and come
    first, as they are found; by their number of tests (xdist's own order) the whole way would come last, alone.
    """
    from xdist.scheduler import LoadScopeScheduling

    class RayInOne(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            folder = file.rpartition("/")[0]
            return folder if folder in ("tests/e2e", "tests/integration") else file

    return RayInOne(config, log)
