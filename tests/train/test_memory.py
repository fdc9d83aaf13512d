import os
import subprocess
import sys

import pytest

AGAIN = """
import resource, sys
import numpy as np
from puna.train.memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.empty(1 << 26, np.uint8).fill(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_memory_that_was_freed_is_not_mapped_anew():
    env = os.environ | {"NUMPY_MADVISE_HUGEPAGE": "0"}
    found = {
        how: int(subprocess.run([sys.executable, "-c", AGAIN, how], env=env, capture_output=True, check=True).stdout)
        for how in ("keep", "leave")
    }
    assert found["keep"] < 100 < 10_000 < found["leave"]
