"""ONNX graphs: made from PyTorch, read and written, changed, and asked what is in them."""
