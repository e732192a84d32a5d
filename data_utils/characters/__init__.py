"""Adds a character of your own to a data root: `python -m data_utils.characters`."""
