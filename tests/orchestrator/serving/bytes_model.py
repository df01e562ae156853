"""What the tests of the engine share: prompts, the context of their model, and each text written alone."""

from GPT2Model.text_generation import generate_text
from orchestrator.text.tokenizers import BytesTokenizer

CONTEXT = 64
PROMPTS = ("ab", "abc \u00e9", "the same long beginning, and x", "the same long beginning, and y")


def alone(model, prompt: str, new: int, *args, **kwargs) -> list[list[int]]:
    return [done.ids for done in generate_text(model, BytesTokenizer(), prompt, new, *args, **kwargs)]
