"""Trees as they are stored: directories, links, layers, history, and what differs."""
