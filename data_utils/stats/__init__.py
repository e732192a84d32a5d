"""Writes the data card of a data root: `python -m data_utils.stats`."""
