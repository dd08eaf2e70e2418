"""Trees as tar archives, OCI images and bundles."""
