"""Pictures of a request: to pixels by the project's own transform, each at its span of ids."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.inputs import MultiModalDataDict
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    ProcessorInputs,
    PromptReplacement,
    PromptUpdate,
    PromptUpdateDetails,
)

from qwen_vl import QwenVLImageProcessor
from qwen_vl.vision import QUERIES
from qwen_vl.vllm_plugin.configuration import QwenVLServingConfig


class PlainPictures(MultiModalDataParser):
    """Leaves pictures to the published transform; vLLM would turn them by EXIF and lay transparent ones on white."""

    def _parse_image_data(self, data: object) -> ImageProcessorItems:
        pictures = [data] if isinstance(data, Image.Image) else list(data)
        if not all(isinstance(picture, Image.Image) for picture in pictures):
            raise ValueError("a picture is a Pillow image; arrays and embeddings are not taken")
        # Through an array, which has neither EXIF nor transparency.
        return ImageProcessorItems([Image.fromarray(np.asarray(picture.convert("RGB"))) for picture in pictures])


class ProcessingInfo(BaseProcessingInfo):
    """What vLLM asks about pictures."""

    def get_hf_config(self) -> QwenVLServingConfig:
        return self.ctx.get_hf_config(QwenVLServingConfig)

    def get_data_parser(self) -> MultiModalDataParser:
        return PlainPictures()

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": QUERIES + 2}

    def span(self) -> list[int]:
        """Returns the ids of a picture: `<img>`, 256 times `<imgpad>`, `</img>`."""
        start = self.get_hf_config().image_start_id
        return [start, *[start + 2] * QUERIES, start + 1]


class DummyPictures(BaseDummyInputsBuilder[ProcessingInfo]):
    """Prompts and pictures of the largest size, for vLLM's trial runs."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return ""

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> MultiModalDataDict:
        side = self.info.get_hf_config().visual["image_size"]
        return {"image": self._get_dummy_images(width=side, height=side, num_images=mm_counts.get("image", 0))}


class PictureProcessor(BaseMultiModalProcessor[ProcessingInfo]):
    """Prompts come with their spans complete: nothing is replaced, the spans are found and the pixels made."""

    def get_dummy_inputs(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: MultiModalDummyOptions
    ) -> ProcessorInputs:
        inputs = super().get_dummy_inputs(seq_len, mm_counts, mm_options)
        inputs.prompt = self.info.span() * mm_counts.get("image", 0)  # no text stands for a picture
        return inputs

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        processor = QwenVLImageProcessor(self.info.get_hf_config().visual["image_size"])
        images: Sequence[Image.Image] = hf_data["images"]
        return BatchFeature({"pixel_values": torch.stack([processor.load(image) for image in images])})

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {"pixel_values": MultiModalFieldConfig.batched("image")}

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        span = self.info.span()
        features = PromptUpdateDetails.select_token_id(span, span[1])
        return [PromptReplacement(modality="image", target=span, replacement=features)]
