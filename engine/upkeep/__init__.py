"""What is reachable, what is damaged, what it takes: collection, verification, repair, usage."""
