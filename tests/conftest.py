"""What all tests share: one thread for torch, whose pool only slows tiny models down."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
