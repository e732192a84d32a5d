"""Grows profiles and dialogues with a strong model behind an endpoint: `python -m data_utils.grow`."""
