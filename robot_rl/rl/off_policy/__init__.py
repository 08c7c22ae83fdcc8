"""The off-policy core: replay of decisions, ensemble critic, one update (methods plug in as a `Proposal`)."""
