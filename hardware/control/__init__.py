"""What has the last word between a policy, a human and a robot. NumPy only; read `hardware.control.executor` first."""
