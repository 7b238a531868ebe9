"""Proteus: distil vision foundation models into small ones with unlabelled images alone."""

__version__ = "0.1.0"
