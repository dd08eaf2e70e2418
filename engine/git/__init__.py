"""Commits of git become snapshots, and snapshots commits."""
