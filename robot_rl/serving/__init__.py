"""A policy on another computer: server, client, and what they say to each other."""
