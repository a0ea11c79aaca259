"""The command line, ``sda-fast``: what each command does, and how it looks to a person."""

from sda_fast.cli.commands import app, main

__all__ = ["app", "main"]
