"""llama.cpp through llama-cpp-python."""

import os
import sys

# How llama.cpp's threads wait for each other, which OpenMP reads when its library is loaded.
WAITS = {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}

# Each thread that decodes gets OpenMP threads of its own, and they stay. As soon as there are more
# of them than cores, GCC's OpenMP lets threads sleep after 100 turns at a barrier, "active" after
# 1,000, which is enough: a second thread decodes up to twice as fast (docs/speed.md). The other two
# keep waiting threads from computing for ever, which is what "active" else means.
if sys.platform == "linux" and not WAITS.keys() & os.environ.keys():
    os.environ.update(WAITS)


def environment() -> dict[str, str]:
    """Return this process's environment without what was set here, for other programs."""
    ours = WAITS.items() <= os.environ.items()
    return {name: value for name, value in os.environ.items() if not (ours and name in WAITS)}
