"""What is asked for: the recipe, its checks, and what it resolves to."""
