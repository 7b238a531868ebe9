"""Segmentation and depth: a head on an encoder's patch tokens, trained and measured by published protocols."""
