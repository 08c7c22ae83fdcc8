"""The safety chain between any command and the robot. NumPy only; start reading at `hardware.safety.chain`."""
