"""Policies: encoder, normaliser and head together, and what wraps them (residual, latent-steered)."""
