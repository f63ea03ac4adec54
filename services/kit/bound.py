"""`python -m services.kit.bound PID MODULE [ARGUMENT...]`: run a module so that it ends with its parent PID.

For the processes of a `BareStack`, whose holder may be killed before it could stop them. The kernel is asked by the
process itself: a function between fork and exec would run in the holder's image, where a signal can get lost.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys

from services.kit.children import die_with_parent


def main() -> None:
    """See the module."""
    die_with_parent(signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):  # it has ended before the kernel was asked
        sys.exit(1)
    del sys.argv[:2]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
