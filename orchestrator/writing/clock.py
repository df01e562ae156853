"""Clock: how fast a text was written. Reading the prompts and writing behind them are two speeds, told apart."""

import time
from collections.abc import Sequence

from GPT2Model.completion import Completion


class Clock:
    """Runs from when it is made. `token` goes into `generate_text(on_token=...)`.

    The first step reads the whole prompts and gives the first token of each text (prefill); every other step reads and
    writes one token of each (decode).

    Args:
        n: samples of each prompt, which stand side by side in what `facts` is given. Each reads its prompt for itself.
        context_length: of the model: of a longer prompt no more than that is read. None: all is.
    """

    def __init__(self, n: int = 1, context_length: int | None = None):
        self.n, self.context_length = n, context_length
        self.started, self.first, self.ended = time.perf_counter(), None, None

    def token(self, index: int, id: int) -> None:
        """A token came."""
        if self.first is None:
            self.first = time.perf_counter()

    def stop(self) -> None:
        """The last token came."""
        self.ended = time.perf_counter()

    def facts(self, found: Sequence[Completion]) -> dict:
        """Tokens and seconds of both parts, JSON-ready."""
        prompts, new = [len(one.prompt_ids) for one in found], sum(len(one.ids) for one in found)
        read = sum(min(length, self.context_length or length) for length in prompts)
        first = self.started if self.first is None else self.first  # no token: nothing was read either
        prefill, decode = first - self.started, self.ended - first
        later = max(0, new - len(found))
        return {
            "prompt_tokens": sum(prompts[:: self.n]), "samples": self.n, "prompt_tokens_read": read,
            "new_tokens": new, "prefill_seconds": prefill, "decode_seconds": decode,
            "prefill_tokens_per_second": speed(read, prefill), "decode_tokens_per_second": speed(later, decode),
        }  # fmt: skip

    def line(self, found: Sequence[Completion]) -> str:
        """The same in a line."""
        facts = self.facts(found)
        parts = [counted(facts["prompt_tokens"], "prompt token"), counted(facts["new_tokens"], "new token")]
        if self.n > 1:
            parts[0] += f", {self.n} samples"
        if (fast := facts["prefill_tokens_per_second"]) is not None:
            if facts["prompt_tokens_read"] != facts["prompt_tokens"]:
                parts[0] += f": {facts['prompt_tokens_read']} read"
            parts[0] += f" in {facts['prefill_seconds']:.2f} s ({fast:.1f} tokens/s)"
        if (fast := facts["decode_tokens_per_second"]) is not None:
            seconds = facts["decode_seconds"]
            parts[1] += f", the first with the prompt, the others in {seconds:.2f} s ({fast:.1f} tokens/s)"
        return "; ".join(parts)


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def speed(tokens: int, seconds: float) -> float | None:
    """Tokens per second; None where nothing was done."""
    return tokens / seconds if tokens and seconds > 0 else None
