"""What all tests share: one thread for torch, whose pool only slows tiny models down, and no deadlines.

A property that takes longer than usual on a busy machine is no less true.
"""

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("supmer", deadline=None)
settings.load_profile("supmer")
