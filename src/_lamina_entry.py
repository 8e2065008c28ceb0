"""The `lamina` command: answers Ctrl-C from the first moment on, then hands over to the package.

Importing JAX takes a second or two, and Python answers an interrupt during an import with a page of
traceback. So the answer is in place before anything is imported, in a module of its own, because
importing any part of a package imports the package first.
"""

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Run the command line of this process."""
    signal.signal(signal.SIGINT, _stop)
    from lamina.cli import main as run

    sys.exit(run())


def _stop(number: int, frame: FrameType | None) -> None:
    """End the process with one line.

    Raising an exception instead would not do: Python loses those that arrive in a callback of the
    garbage collector or a weak reference, and prints a traceback for each.
    """
    # The cursor is hidden while a progress bar is shown.
    cursor = b"\x1b[?25h\n" if os.isatty(2) else b""
    os.write(2, cursor + b"lamina: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
