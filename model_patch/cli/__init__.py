"""The command `polar`: one small file a subcommand, results on stdout, progress and errors on stderr."""

from model_patch.cli.app import main

__all__ = ["main"]
