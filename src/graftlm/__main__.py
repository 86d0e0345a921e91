"""`graft` and `python -m graftlm`: the same command, which `cli/` runs."""

import sys
import time

BEGAN = time.perf_counter()


def main() -> int:
    """Run the command with this process's arguments; returns the exit status."""
    from graftlm import process
    from graftlm.cli import internal_error, run
    from graftlm.cli.parser import wants_debug
    from graftlm.training.signals import exit_with_parent

    process.BEGAN = BEGAN
    exit_with_parent()
    words = sys.argv[1:]
    if not wants_debug(words):
        sys.excepthook = internal_error  # the exit status stays Python's own for an exception: 1
    return run(words)


if __name__ == "__main__":
    sys.exit(main())
