"""Hostile and broken inputs by the thousand: every one has to end in the right result or in one message."""
