"""Recorders: of executed steps as a data set, and of topics as a bag."""
