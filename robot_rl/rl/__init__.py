"""Fine-tuning by reinforcement learning: one on-policy core, one off-policy core, and the methods on them."""
