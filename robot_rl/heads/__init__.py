"""Generative action heads behind one interface (`robot_rl.heads.base.Head`)."""
