"""Cutting what a plan gives up, at once or in rounds."""
