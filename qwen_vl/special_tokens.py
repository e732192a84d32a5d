"""The special tokens of Qwen-VL, in the order of their ids. Imports nothing, so that checks of texts start at once."""

# published: the order decides every id.
VISION_TAGS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>")
IMAGE_TAGS = ("<img>", "</img>", "<imgpad>")
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{i}|>" for i in range(205)),
    *VISION_TAGS,
)
IMAGE_SPAN = 256  # ids between <img> and </img>, one for each output of the resampler
