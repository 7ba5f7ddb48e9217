"""The machine: its hardware, its libraries, what they lack, and the GPU while it works."""
