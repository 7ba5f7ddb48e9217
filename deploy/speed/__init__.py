"""Latency as a goal: what layers cost on the machine where the network will run, and the network that fits a target."""
