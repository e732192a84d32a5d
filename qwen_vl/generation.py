"""Generation for many requests at once: the public names of `qwen_vl.engine`."""

from qwen_vl.engine.engine import BatchGenerator
from qwen_vl.engine.requests import Event, Request, Result, Statistics

__all__ = ["BatchGenerator", "Event", "Request", "Result", "Statistics"]
