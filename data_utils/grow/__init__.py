"""Grows profiles and dialogues with a model behind an endpoint: `python -m data_utils.grow`."""
