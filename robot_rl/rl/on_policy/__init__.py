"""The on-policy core: decisions, advantages, ratios, one update (methods plug in as an `OnPolicyActor`)."""
