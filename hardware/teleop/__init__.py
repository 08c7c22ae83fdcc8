"""Operator devices: the terminal's keyboard, and scripts that press its keys."""
