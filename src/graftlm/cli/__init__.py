"""The command line: `main` runs a subcommand and prints its errors, `display` prints its result."""

from graftlm.cli.main import COMMANDS, Command, internal_error, run

__all__ = ["COMMANDS", "Command", "internal_error", "run"]
