"""Measures of throughput: small commands that print a table of what this machine does."""
