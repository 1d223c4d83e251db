"""Checkpoints on disk: strict reading, whole-or-nothing writing, and the published layouts."""
