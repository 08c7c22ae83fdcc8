"""Robots, operators and the executor between them and a policy. NumPy only; `hardware.ros` adds ROS 2."""
