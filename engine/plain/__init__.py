"""Plain directories become trees, and trees plain directories."""
