"""Starts launch files in YAML without ROS 2's launch tools: a stated subset of their format, and nothing beyond it."""
