"""Rolling policies out: the chunk player, evaluation with intervals, collection of demonstrations."""
