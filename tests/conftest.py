"""For all tests: one thread a process, set before torch is imported.

Tests that kill or race processes fork them, and a fork of a process whose OpenMP threads have run waits for them
forever.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
