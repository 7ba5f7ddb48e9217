"""Fine-tuning against the dense parent, in one process or several, and accuracy."""
