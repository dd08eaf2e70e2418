"""Trees in memory for search loops, and their commits."""
