"""Prompts: from texts or ids, one or several, to rows of ids; and rows of unequal length to one batch."""

from collections.abc import Iterable, Sequence
from numbers import Integral

import torch
from torch import Tensor

from GPT2Model.generation import as_number


def left_padded(rows: Sequence[Sequence[int]], device=None) -> tuple[Tensor, Tensor | None]:
    """ids (B, longest) with zeros on the left, and the mask that says where; None where nothing was padded."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], dtype=torch.int64, device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    if bool((lengths == longest).all()):
        return ids, None
    return ids, torch.arange(longest, device=device) >= longest - lengths[:, None]


def read_prompts(prompts, tokenizer) -> tuple[list[list[int]], list[str]]:
    """The token ids of every prompt that can be read, and what is wrong with the others."""
    found, problems = read_each(prompts, tokenizer)
    return [row for row in found if row is not None], problems


def read_each(prompts, tokenizer) -> tuple[list[list[int] | None], list[str]]:
    """The token ids of every prompt, None for one that cannot be read, and what is wrong with those."""
    if isinstance(prompts, Tensor):
        prompts = prompts.tolist()
    if isinstance(prompts, bytes) or not isinstance(prompts, Iterable):
        return [], [f"prompts must be a text, or several, or the token ids of one or several, got {prompts!r}."]
    given = [prompts] if isinstance(prompts, str) else [as_number(one) for one in prompts]
    alone = bool(given) and all(isinstance(one, Integral) for one in given)
    given = [given] if alone else given
    rows, problems = [], [] if given else ["prompts are empty: give a text, or the token ids of one."]
    for number, prompt in enumerate(given, 1):
        which = "the prompt" if len(given) == 1 else f"prompt {number} of {len(given)}"
        row = None
        try:
            row = ids_of(prompt, tokenizer)
        except (ValueError, TypeError) as error:
            problems.append(f"{which} cannot be read: {error}")
        if row == []:
            end = getattr(tokenizer, "end_of_text", None)
            hint = "" if end is None else (
                f"; to begin from nothing, give what stands before a text: {tokenizer.decode([end])!r}"
            )  # fmt: skip
            problems.append(f"{which} is empty, and a model continues one token at least{hint}.")
        rows.append(row)
    return rows, problems


def ids_of(prompt: object, tokenizer) -> list[int]:
    """The token ids of one prompt.

    Raises:
        ValueError, TypeError: what is neither a text that the tokenizer knows nor whole numbers.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError("it is a text, and there is no tokenizer: give its token ids, or the tokenizer.")
        return list(tokenizer.encode(prompt))
    if isinstance(prompt, Tensor):
        prompt = prompt.tolist()
    if isinstance(prompt, bytes) or not isinstance(prompt, Iterable):
        raise TypeError(f"it must be a text or ids, got {prompt!r}.")
    row = [as_number(one) for one in prompt]
    wrong = [one for one in row if not isinstance(one, Integral)]
    if wrong:
        raise TypeError(f"token ids are whole numbers, got {wrong[0]!r}.")
    if far := [one for one in row if not -(2**63) <= one < 2**63]:
        raise ValueError(f"no vocabulary has the token id {far[0]}: wrong tokenizer?")
    return row
