"""Simulation: batched MuJoCo, rendering, tasks and their experts."""
