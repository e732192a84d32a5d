"""Fetches data, pictures and weights: `python -m data_utils.download`."""
