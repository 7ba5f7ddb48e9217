"""Bounds and values that may be chosen by name. Importing this is quick: the recipe reads it before torch is loaded."""

MAX_STREAMS = 256
"""So many sessions at once can be measured at most."""
