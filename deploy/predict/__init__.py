"""What networks see in pictures: the dense and the pruned one of a run side by side, or one that was written here."""
