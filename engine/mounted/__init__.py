"""What a mount shows, as inodes: snapshots, and the live view of sessions. Needs no FUSE."""
