"""Brings a character of your own into a data root: `python -m data_utils.characters`."""
