"""Emulated robots that speak the real protocols: for tests of drivers, and for dry runs without a robot."""
