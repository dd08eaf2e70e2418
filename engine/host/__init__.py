"""The host's files: their kinds and attributes, removing them, and who holds what."""
