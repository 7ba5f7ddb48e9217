"""What a network is made of: prunable groups, segments of its forward pass, layers, and how big it is."""
