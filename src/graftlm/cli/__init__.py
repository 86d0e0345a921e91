"""The command line: `main` runs a subcommand of `commands`, `parser` reads its flags, `display` prints its result."""

from graftlm.cli.commands import COMMANDS, Command
from graftlm.cli.main import internal_error, run

__all__ = ["COMMANDS", "Command", "internal_error", "run"]
