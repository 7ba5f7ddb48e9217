"""Make a trained vision transformer smaller, build an engine from it, and prove that it is faster and still right."""
