"""Robots: a simulated lane in real time, and fakes for tests."""
