"""Several methods on one base, budget and seeds, side by side."""
