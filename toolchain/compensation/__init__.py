"""Rotate, cut, refit: what makes the same cut lose less, in closed form and without labels."""
