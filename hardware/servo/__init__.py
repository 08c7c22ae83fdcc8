"""Servo buses: the protocols of Feetech and Dynamixel servos, their registers, and the calibration of arms."""
