"""Detectors as ONNX files and engines: export, suppression of overlaps, parity, and AP of what really runs."""
