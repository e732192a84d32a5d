"""Draws a small made-up data set: `python -m data_utils.demo`."""
