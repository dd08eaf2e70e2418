"""What is kept, and how: databases with transactions, chunks, nodes, records."""
