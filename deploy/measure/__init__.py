"""Measuring: parity, accuracy, latency, and what holds latency up."""
