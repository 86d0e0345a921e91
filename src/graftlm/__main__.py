"""`graft` and `python -m graftlm`: the same command, which `cli/main.py` runs."""

import os
import sys
import time

BEGAN = time.perf_counter()


def main() -> int:
    """Run the command with this process's arguments; returns the exit status."""
    import graftlm.cli.main as cli

    cli.BEGAN = BEGAN
    if "GRAFT_PARENT_PIPE" in os.environ:
        from graftlm.studies.subprocess_runner import exit_with_parent

        exit_with_parent()
    words = sys.argv[1:]
    if not cli.wants_debug(words):
        sys.excepthook = cli.internal_error  # the exit status stays Python's own for an exception: 1
    return cli.run(words)


if __name__ == "__main__":
    sys.exit(main())
