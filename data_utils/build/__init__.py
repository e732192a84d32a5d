"""Writes training, test and reward-model files: `python -m data_utils.build`."""

from data_utils.samples import build_sample

__all__ = ["build_sample"]
