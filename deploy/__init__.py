"""Make it run: ONNX, precision, engines, runtimes, measurements, the report, and the command line that drives it all."""
