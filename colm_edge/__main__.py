"""`python -m colm_edge` is `colm-edge`."""

from __future__ import annotations

import signal


def start() -> None:
    """Run the command line. Until it is imported Ctrl-C ends the process, without a traceback."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from colm_edge.cli import main

    signal.signal(signal.SIGINT, before)
    main()


if __name__ == "__main__":
    start()
