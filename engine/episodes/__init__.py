"""What searches did: steps, the best of them, pruning; bisection."""
