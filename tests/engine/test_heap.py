"""Freed memory stays with the process."""

import os
import subprocess
import sys

import pytest

COUNT = """
import resource, torch
from proteus.engine.heap import keep_freed_memory
torch.set_num_threads(1)
if {keep}:
    keep_freed_memory()
def step():
    kept = [torch.ones(16, 2**18) for _ in range(20)]  # 20 blocks of 16 MB
    del kept
for _ in range(5):  # the heap grows until its blocks, aligned as torch wants them, fit into what was freed
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_a_later_step_fetches_little_from_the_kernel():
    def faults(keep):
        code = COUNT.format(keep=keep)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    # Of the 81,920 pages that a step writes to. Without us, whatever happens to lie above the blocks may keep them.
    assert faults(True) < 8_000
    assert any(faults(False) > 40_000 for _ in range(10))
