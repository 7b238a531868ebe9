"""From frozen features to scores."""
