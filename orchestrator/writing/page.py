"""Page: what the model writes, shown as it comes. stdout holds the texts, and between several of them headings."""

from collections.abc import Sequence

from GPT2Model.completion import Completion


class Page:
    """The completions of some prompts, on stdout: the first as it grows, the others when all are complete.

    Args:
        prompts: as texts.
        n: completions of each.
        tokenizer: of the model, for the words of the log-probabilities.
    """

    def __init__(self, prompts: Sequence[str], n: int, tokenizer):
        self.prompts, self.n, self.tokenizer = prompts, n, tokenizer
        self.begun = False

    def show(self, index: int, piece: str) -> None:
        """A piece of the completion of this number: goes into `generate_text(on_text=...)`."""
        if index == 0:
            self.begin()
            print(piece, end="", flush=True)

    def begin(self) -> None:
        """The first heading, once, and not before there is something to show: an error may come instead."""
        if not self.begun and len(self.prompts) * self.n > 1:
            print(self.heading(0), flush=True)
        self.begun = True

    def finish(self, found: Sequence[Completion]) -> None:
        """The end of the first text's line, the other texts, and log-probabilities."""
        self.begin()
        for index, completion in enumerate(found):
            if index:
                print(self.heading(index))
                print(completion.text, end="")
            print()
            for line in logprob_lines(completion, self.tokenizer):
                print(line)
        print(end="", flush=True)

    def heading(self, index: int) -> str:
        """What stands above a text where there are several."""
        prompt, sample = divmod(index, self.n)
        of_prompt = f"prompt {prompt + 1} of {len(self.prompts)}" if len(self.prompts) > 1 else ""
        of_sample = f"sample {sample + 1} of {self.n}" if self.n > 1 else ""
        return f"--- {', '.join(filter(None, [of_prompt, of_sample]))}"


def logprob_lines(completion: Completion, tokenizer) -> list[str]:
    """A line for each token: its log-probability, and the likeliest ones."""
    if completion.logprobs is None:
        return []
    lines = ["log-probabilities in nats, of the model's own distribution:"]
    for token, noted in zip(completion.ids, completion.logprobs, strict=True):
        top = "  ".join(f"{tokenizer.decode([other])!r} {value:.2f}" for other, value in noted.top.items())
        lines.append(f"{noted.logprob:8.3f}  {tokenizer.decode([token])!r:16} {top}".rstrip())
    return lines


def as_data(completion: Completion, prompt: str, tokenizer) -> dict:
    """A completion, JSON-ready."""

    def of(token: int, logprob: float) -> dict:
        return {"id": token, "token": tokenizer.decode([token]), "logprob": logprob}

    logprobs = completion.logprobs
    if logprobs is not None:
        pairs = zip(completion.ids, logprobs, strict=True)
        logprobs = [of(token, one.logprob) | {"top": [of(*pair) for pair in one.top.items()]} for token, one in pairs]
    return {
        "prompt": prompt, "prompt_ids": completion.prompt_ids, "ids": completion.ids, "text": completion.text,
        "finish_reason": completion.finish_reason, "logprobs": logprobs,
    }  # fmt: skip
