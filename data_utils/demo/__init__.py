"""Draws a small made-up world in the layout of MMRole-Data: `python -m data_utils.demo`."""
