"""The command line, `rosa-fx`. Nothing heavy is imported here, so that `--help` answers at once."""

from rosa_fx.cli.app import app, main

__all__ = ["app", "main"]
