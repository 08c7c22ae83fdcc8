"""A policy on a robot, from start to report: begin reading at `hardware.deployment.run`."""
