"""Writes the data card: `python -m data_utils.stats`."""
