"""Contracts that every room stands on. NumPy only; imports nothing else of ours."""
