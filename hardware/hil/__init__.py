"""Learning with a human in the loop: an actor on the executor's path, a learner in its own process."""
