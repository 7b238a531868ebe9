"""What any optimisation needs, whatever is learnt."""
