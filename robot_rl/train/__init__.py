"""Supervised training, run directories and live progress."""
