"""Distillation: the step, the loop, what is on disk, what is on screen."""
