"""Finds what is wrong with a data root: `python -m data_utils.check`."""
