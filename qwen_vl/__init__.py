"""Qwen-VL, native and exact: the model and nothing about MMRole."""

from qwen_vl.configuration import QwenVLConfig
from qwen_vl.images import QwenVLImageProcessor
from qwen_vl.loading import load
from qwen_vl.modeling import QwenVLForCausalLM
from qwen_vl.tokenization import QwenVLTokenizer

__all__ = ["QwenVLConfig", "QwenVLForCausalLM", "QwenVLImageProcessor", "QwenVLTokenizer", "load"]
