"""generate(): the model writes, one token at a time: score, pick, append, repeat.

With a KV cache each step reads one new token; without, the whole text so far. Both give the same text, since under
a causal mask an old token's keys and values never change. When the text outgrows the context, generate() says so, or,
if asked, lets the window slide: every token's position changes, the cache is worthless, and each step reads the last
context_length tokens again. How a token is picked: `GPT2Model/sampling.py`. From text to text: `text_generation.py`.
"""

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral, Real

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from CMHA.choosing.choose import reads_pages
from CMHA.kv_cache import KVCache
from CMHA.masks import check_padding_mask
from GPT2Model.paged_forward import PagedRows
from GPT2Model.sampling import Sampler, Sampling, check_numbers, filtered_probabilities, sample

__all__ = ["filtered_probabilities", "generate", "make_cache", "next_logits", "sample"]
PAST_CONTEXT = ("error", "slide")


@torch.no_grad()
def generate(
    model,
    ids: Int[Tensor, "batch tokens"],
    max_new_tokens: int,
    temperature: float = 0.0,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop_tokens: int | Collection[int] = (),
    pad_token: int | None = None,
    seed: int | None = None,
    padding_mask: Bool[Tensor, "batch tokens"] | None = None,
    use_cache: bool = True,
    past_context: str = "error",
    on_token: Callable[[Tensor], None] | None = None,
    on_step: Callable[[Tensor, Tensor], Tensor | None] | None = None,
) -> Int[Tensor, "batch longer"]:
    """Continue each row of `ids` by up to `max_new_tokens` tokens.

    Args:
        model: a GPTModel. It is put into eval for the time, and back.
        ids: (B, T) prompts. Rows of different lengths: pad on the *left*, and say where in padding_mask.
        max_new_tokens: 0 or more.
        temperature: 0 picks the likeliest token (greedy). 1 samples from the model's own distribution; lower is safer.
        top_k: sample from the k likeliest tokens only.
        top_p: sample from the fewest tokens whose probabilities sum to p at least ("nucleus"; Holtzman et al., 2019).
        min_p: sample from the tokens at least this many times as likely as the likeliest (Nguyen et al., 2024).
        repetition_penalty: above 1, tokens that were read or written become less likely (Keskar et al., 2019). 1: none.
        stop_tokens: an id, or several. A row that has produced one is finished; generation ends when all are.
        pad_token: what stands behind a row's stop; None: the row's last token, once more.
        seed: row i draws from a generator of its own, seeded with seed + i: on one machine its text is the same again,
            whatever the other rows are. None: torch's global state.
        padding_mask: (B, T) bool, True = a real token.
        use_cache: keep keys and values of old tokens. The text is the same without, and slower.
        past_context: what to do with more tokens than context_length. "error": say so before anything is computed.
            "slide": read the last context_length tokens only, each step all of them anew. That is an approximation: in
            training no text moved through the positions like that, and what slid out is forgotten.
        on_token: called with the (B,) new ids after each step: to show the text as it grows.
        on_step: called with the (B, vocab_size) logits and the (B,) new ids after each step. It may return a (B,) bool
            tensor: the rows that are finished now.
    Returns:
        (B, T + n) ids, the prompts included; n <= max_new_tokens, fewer only if every row stopped.
    Raises:
        TypeError: what is no model. ValueError: every other argument that makes no sense, at once; or logits of NaN.
    """
    check_model(model)
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    stops = as_set(stop_tokens)
    problems = problems_of(model, ids, max_new_tokens, sampling, stops, pad_token, padding_mask, past_context)
    if problems:
        raise ValueError("generate() cannot run:\n" + "\n".join(f"  - {problem}" for problem in problems))
    samplers = [Sampler(for_row(sampling, i), ids.device) for i in range(len(ids))]
    stop_ids = torch.tensor(sorted(stops), dtype=ids.dtype, device=ids.device)
    finished = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    cache = None
    if use_cache and ids.shape[1] <= model.cfg["context_length"]:
        longest = min(ids.shape[1] + max_new_tokens, model.cfg["context_length"])
        cache = PagedRows(model, len(ids), longest) if wants_pages(model) else make_cache(model, len(ids), longest)

    with evaluating(model):
        for _ in range(max_new_tokens):
            logits = next_logits(model, ids, padding_mask, cache)
            chosen = pick(logits, ids, padding_mask, samplers)
            chosen = torch.where(finished, ids[:, -1] if pad_token is None else pad_token, chosen)
            ids = torch.cat([ids, chosen[:, None]], dim=1)
            if padding_mask is not None:
                padding_mask = torch.cat([padding_mask, torch.ones_like(padding_mask[:, :1])], dim=1)
            if on_token is not None:
                on_token(chosen)
            if stops:
                finished = finished | torch.isin(chosen, stop_ids)
            if on_step is not None and (ended := on_step(logits, chosen)) is not None:
                finished = finished | ended
            if (stops or on_step is not None) and bool(finished.all()):
                break
    return ids


def make_cache(model, batch_size: int, max_length: int) -> KVCache:
    """An empty KVCache that fits `model`, in its dtype and on its device."""
    attention, weight = model.blocks[0].attention, model.token_embedding.weight  # W_qkv may hold 8 bits
    return KVCache(
        len(model.blocks), batch_size, attention.num_kv_heads, max_length, attention.head_dim,
        dtype=weight.dtype, device=weight.device,
    )  # fmt: skip


def next_logits(
    model, ids: Tensor, padding_mask: Tensor | None, cache: KVCache | PagedRows | None
) -> Float[Tensor, "batch vocab_size"]:
    """Scores for the token after `ids`, reading only what the cache has not read yet."""
    window = model.cfg["context_length"]
    if cache is None or ids.shape[1] > window:
        mask = None if padding_mask is None else padding_mask[:, -window:]
        return model(ids[:, -window:], mask)[:, -1]
    if isinstance(cache, PagedRows):
        return cache.next_logits(model, ids, padding_mask)
    return model(ids[:, cache.length :], padding_mask, cache)[:, -1]


def pick(
    logits: Float[Tensor, "batch vocab_size"], ids: Tensor, padding_mask: Tensor | None, samplers: Sequence[Sampler]
) -> Int[Tensor, "batch"]:
    """Each row's next token. All rows share one distribution's settings, and each draws from its own generator."""
    check_numbers(logits)
    sampling = samplers[0].sampling
    if sampling.repetition_penalty != 1:
        read = ids if padding_mask is None else [row[real] for row, real in zip(ids, padding_mask, strict=True)]
        logits = torch.stack([one.logits(*row) for one, *row in zip(samplers, logits, read, strict=True)])
    if sampling.greedy:
        return logits.argmax(dim=-1).to(ids.dtype)
    cuts = {"top_k": sampling.top_k, "top_p": sampling.top_p, "min_p": sampling.min_p}
    probabilities = filtered_probabilities(logits, sampling.temperature, **cuts)
    drawn = [
        torch.multinomial(row, 1, generator=one.generator) for one, row in zip(samplers, probabilities, strict=True)
    ]
    return torch.cat(drawn).to(ids.dtype)


def for_row(sampling: Sampling, row: int) -> Sampling:
    """The settings of one row: the seed counts on."""
    return sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + row)


def wants_pages(model) -> bool:
    """Whether this model was asked to keep keys and values in pages."""
    return reads_pages(model.blocks[0].attention.settings.requested)


@contextmanager
def evaluating(model) -> Iterator[None]:
    """Every module in eval, and back in its own mode afterwards: one part may have been frozen in eval."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def as_set(stop_tokens: int | Collection[int]) -> set:
    """Stop tokens, however they were given."""
    if isinstance(stop_tokens, Tensor):
        stop_tokens = stop_tokens.tolist()
    alone = isinstance(stop_tokens, str) or not isinstance(stop_tokens, Iterable)
    given = [as_number(one) for one in ([stop_tokens] if alone else stop_tokens)]
    # What is no number is refused by problems_of(), in words: here it need only fit into a set.
    return {one if isinstance(one, Hashable) else repr(one) for one in given}


def as_number(one: object) -> object:
    """A whole number as an int, of whatever type it was; anything else as it is."""
    if isinstance(one, Tensor) and one.numel() == 1:
        one = one.item()
    return int(one) if isinstance(one, Integral) else one


def check_model(model) -> None:
    """Raise TypeError for what cannot be a GPTModel: arguments that were swapped, say, or a path."""
    if not hasattr(model, "cfg") or not hasattr(model, "blocks"):
        raise TypeError(
            f"the model comes first and must be a GPTModel, got {type(model).__name__}: "
            "GPTModel.from_pretrained(FOLDER) opens one. The order "
            "is (model, ids, max_new_tokens) in generate(), and (model, tokenizer, prompts, "
            "max_new_tokens) in generate_text()."
        )


def problems_of_sampling(sampling: object) -> list[str]:
    """What is wrong with the settings of the draws, or with what was passed in their place."""
    if isinstance(sampling, Sampling):
        return sampling.problems()
    number = isinstance(sampling, Real) and not isinstance(sampling, bool)
    like = f"Sampling(temperature={sampling if number else 0.8})"
    return [f"sampling must be a Sampling, got {sampling!r}: pass {like}."]


def problems_of(
    model, ids, max_new_tokens, sampling: Sampling, stops: set, pad_token=None, padding_mask=None, past_context="error"
) -> list[str]:
    """Everything wrong with a call of generate(), one sentence each; empty: nothing. Nothing is computed."""
    problems, vocab_size = problems_of_sampling(sampling), model.cfg["vocab_size"]
    if not isinstance(max_new_tokens, Integral) or isinstance(max_new_tokens, bool) or max_new_tokens < 0:
        problems.append(f"max_new_tokens must be a whole number, 0 or more, got {max_new_tokens!r}.")
        max_new_tokens = 0
    for token in [*sorted(stops, key=repr), *([] if pad_token is None else [pad_token])]:
        if not isinstance(token, Integral) or not 0 <= token < vocab_size:
            problems.append(
                f"stop and pad tokens are ids in 0..{vocab_size - 1}, got {token!r} (tokenizer.end_of_text is one)."
            )
    if past_context not in PAST_CONTEXT:
        problems.append(f'past_context must be "error" or "slide", got {past_context!r}.')
    if not isinstance(ids, Tensor):
        remedy = "torch.tensor([tokenizer.encode(text)])" if isinstance(ids, str) else "torch.tensor(ids)"
        return [*problems, f"ids must be a tensor (B, T), got {type(ids).__name__}: {remedy}; one text is [ids]."]
    if ids.dtype not in (torch.int64, torch.int32):
        problems.append(f"ids must be whole numbers (int64), got {ids.dtype}: ids.long()?")
    elif ids.numel() and not 0 <= ids.min() <= ids.max() < vocab_size:
        problems.append(
            f"token ids must be in 0..{vocab_size - 1}, got {ids.min()}..{ids.max()}: wrong tokenizer? (Padding too "
            "needs ids of the vocabulary.)"
        )
    if ids.ndim != 2 or ids.numel() == 0:
        problems.append(
            "ids must be (B, T), with one row and one token at least: an empty prompt has nothing to continue (one "
            f"text is ids[None]), got {tuple(ids.shape)}."
        )
        return problems
    if past_context == "error":
        problems += too_long(ids.shape[1], max_new_tokens, model.cfg["context_length"])
    if padding_mask is not None:
        try:
            check_padding_mask(padding_mask, ids.shape[1], ids.shape[0])
        except (TypeError, ValueError) as error:
            problems.append(str(error))
        else:
            if not bool(padding_mask[:, -1:].all()):
                problems.append(
                    "the last token of a row is padding: pad prompts on the left, so that each ends in a real token."
                )
    return problems


def too_long(prompt: int, new: int, context_length: int, which: str = "") -> list[str]:
    """The one problem of a text that outgrows the context, in tokens; empty: it fits. which: "prompt 2 of 3: "."""
    if prompt + new <= context_length:
        return []
    room = context_length - prompt
    fits = f"at most {counted(room, 'new token')} fit{'s' * (room == 1)}"
    if room <= 0:
        fits = f"leave out {1 - room} of its tokens at least"
    return [
        f"{which}a prompt of {counted(prompt, 'token')} and {counted(new, 'new one')} are more than "
        f"context_length={context_length}: {fits}. Or "
        'past_context="slide": each step reads the last context_length tokens anew; slower, and an approximation.'
    ]


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
