"""Writes the data for other trainers: `python -m data_utils.export`."""
