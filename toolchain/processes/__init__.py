"""Several processes at one job: who leads, what they share, and how all end when one of them does."""
