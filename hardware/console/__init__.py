"""A browser page as operator device and instrument panel: one desk for several tabs, with a dead-man that they hold."""
