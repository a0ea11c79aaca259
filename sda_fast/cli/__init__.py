"""The command line, ``sda-fast``: what each command does, and how it looks to a person."""

from sda_fast.cli import commands, edit_commands  # noqa: F401 (they put themselves into the app)
from sda_fast.cli.app import app, main

__all__ = ["app", "main"]
