"""Data: sets on disk, readers and writers, windows, the normaliser and the replay buffer."""
