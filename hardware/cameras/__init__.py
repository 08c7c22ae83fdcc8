"""Cameras, each with a thread of its own, and the robots that they are mounted on."""
