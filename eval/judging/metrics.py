"""The eight metrics of MMRole-Eval, in published order (paper section 4, released RM_review.py)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One aspect that a reviewer scores.

    Attributes:
        name: The published name: key in `rm_review`, heading in the CSV and in the paper's table.
        short: A heading of at most nine characters for narrow tables.
        dimension: Which of the paper's three groups of metrics it belongs to.
        template: The question to the reviewer, with `{role}` and `{partner}` to fill in.
    """

    name: str
    short: str
    dimension: str
    template: str

    def question(self, *, role: str, partner: str) -> str:
        """Return the question to the reviewer, beginning with the metric's name.

        Args:
            role: The character that the answer plays.
            partner: Its partner: "the curious human" or another character.
        """
        # One pass only: braces in a name are not filled in again.
        return f"{self.name}: {self.template.format(role=role, partner=partner)}"


CONVERSATION = "Fundamental Conversational Skills"
MULTIMODAL = "Multimodal Understanding Abilities"
ROLE_PLAYING = "Role-Playing Qualities"

METRICS: tuple[Metric, ...] = (
    Metric(
        "Instruction Adherence",
        "Instruct.",
        CONVERSATION,
        "Do the responses accurately adhere to the task instruction, directly role-playing as {role} and only "
        "including words that {role} should say, without any additional explanatory prefixes or suffixes?",
    ),
    Metric("Fluency", "Fluency", CONVERSATION, "Are the responses grammatically correct and smoothly articulated?"),
    Metric(
        "Coherency",
        "Coherency",
        CONVERSATION,
        "Do the responses maintain a coherent thread of dialogue without contradicting earlier parts of the "
        "conversation or previously established facts?",
    ),
    Metric(
        "Image-Text Relevance",
        "Image",
        MULTIMODAL,
        "Are the responses closely related to the visual content of the image?",
    ),
    Metric(
        "Response Accuracy",
        "Accuracy",
        MULTIMODAL,
        "Do the responses accurately answer {partner}'s words or appropriately initiate a conversation based on the "
        "image?",
    ),
    Metric(
        "Personality Consistency",
        "Personal.",
        ROLE_PLAYING,
        "Do the responses accurately and sufficiently reflect the personality of {role}?",
    ),
    Metric(
        "Knowledge Consistency",
        "Knowledge",
        ROLE_PLAYING,
        "Are the responses consistent with the factual knowledge that {role} should possess, including experiences, "
        "abilities, and relationships?",
    ),
    Metric(
        "Tone Consistency",
        "Tone",
        ROLE_PLAYING,
        "Do the responses maintain a consistent tone that aligns with {role}'s typical manner of speaking and "
        "catchphrases, rather than resembling the style of AI assistants?",
    ),
)

METRIC_NAMES: tuple[str, ...] = tuple(metric.name for metric in METRICS)
