"""Command-line verbs that `hardware` brings."""
