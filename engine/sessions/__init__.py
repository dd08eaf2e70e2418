"""Sessions: records, the upper on the host's disk, and how both become a tree."""
