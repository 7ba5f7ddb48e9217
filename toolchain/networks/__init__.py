"""Networks from names, checkpoints and model folders, and back; shorter ones of the same architecture."""
