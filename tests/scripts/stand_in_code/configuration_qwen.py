"""Stand-in for a released configuration: any field, kept as it is."""

from transformers import PretrainedConfig


class QWenConfig(PretrainedConfig):
    model_type = "qwen"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(self, differs=(), **fields):
        self.differs = list(differs)
        super().__init__(**fields)
