"""Patches written, read and applied."""
