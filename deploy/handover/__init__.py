"""What is handed over: a folder that runs without this tool, and a model repository for Triton."""
