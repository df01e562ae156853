"""generate(): the model writes, one token at a time: score, pick, append, repeat.

With a KV cache each step reads one new token; without, the whole text so far. Both give the same text, since under
a causal mask an old token's keys and values never change. When the text outgrows the context, the window slides:
every token's position changes, the cache is worthless, and each step reads the last context_length tokens again.
"""

from collections.abc import Callable, Collection
from numbers import Integral, Real

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from CMHA.kv_cache import KVCache
from CMHA.masks import check_padding_mask


@torch.no_grad()
def generate(
    model,
    ids: Int[Tensor, "batch tokens"],
    max_new_tokens: int,
    temperature: float = 0.0,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: int | Collection[int] = (),
    pad_token: int | None = None,
    seed: int | None = None,
    padding_mask: Bool[Tensor, "batch tokens"] | None = None,
    use_cache: bool = True,
    on_token: Callable[[Tensor], None] | None = None,
) -> Int[Tensor, "batch longer"]:
    """Continue each row of `ids` by up to `max_new_tokens` tokens.

    Args:
        model: a GPTModel. It is put into eval for the time, and back.
        ids: (B, T) prompts. Rows of different lengths: pad on the *left*, and say where in padding_mask.
        max_new_tokens: 0 or more.
        temperature: 0 picks the likeliest token (greedy). 1 samples from the model's own distribution; lower is safer.
        top_k: sample from the k likeliest tokens only.
        top_p: sample from the fewest tokens whose probabilities sum to p at least ("nucleus"; Holtzman et al., 2019).
        stop_tokens: an id, or several. A row that has produced one is finished; generation ends when all are.
        pad_token: what stands behind a row's stop; None: the stop token itself, once more.
        seed: of the sampling, for one result on one machine; None: torch's global state.
        padding_mask: (B, T) bool, True = a real token.
        use_cache: keep keys and values of old tokens. The text is the same without, and slower.
        on_token: called with the (B,) new ids after each step: to show the text as it grows.
    Returns:
        (B, T + n) ids, the prompts included; n <= max_new_tokens, fewer only if every row stopped.
    Raises:
        ValueError: every argument that makes no sense, at once.
    """
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids must be a tensor (B, T) of token ids, got {type(ids).__name__}: torch.tensor([ids]).")
    if isinstance(stop_tokens, str):
        raise TypeError(f"stop_tokens are token ids, got the text {stop_tokens!r}: tokenizer.end_of_text is one.")
    stops = {int(token) for token in ([stop_tokens] if isinstance(stop_tokens, Integral) else stop_tokens)}
    check_arguments(model, ids, max_new_tokens, temperature, top_k, top_p, stops, pad_token, padding_mask)
    generator = None if seed is None else torch.Generator(ids.device).manual_seed(seed)
    stop_ids = torch.tensor(sorted(stops), dtype=ids.dtype, device=ids.device)
    finished = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    context_length = model.cfg["context_length"]
    cache = None
    if use_cache and ids.shape[1] <= context_length:
        cache = make_cache(model, ids.shape[0], min(ids.shape[1] + max_new_tokens, context_length))

    modes = [(module, module.training) for module in model.modules()]  # one part may be frozen in eval
    model.eval()
    try:
        for _ in range(max_new_tokens):
            logits = next_logits(model, ids, padding_mask, cache)
            chosen = sample(logits, temperature, top_k=top_k, top_p=top_p, generator=generator)
            if stops:
                chosen = torch.where(finished, ids[:, -1] if pad_token is None else pad_token, chosen)
                finished = finished | torch.isin(chosen, stop_ids)
            ids = torch.cat([ids, chosen[:, None]], dim=1)
            if padding_mask is not None:
                padding_mask = torch.cat([padding_mask, torch.ones_like(padding_mask[:, :1])], dim=1)
            if on_token is not None:
                on_token(chosen)
            if stops and bool(finished.all()):
                break
    finally:
        for module, training in modes:
            module.training = training
    return ids


def make_cache(model, batch_size: int, max_length: int) -> KVCache:
    """An empty KVCache that fits `model`, in its dtype and on its device."""
    attention = model.blocks[0].attention
    weight = attention.W_qkv.weight
    return KVCache(
        len(model.blocks), batch_size, attention.num_kv_heads, max_length, attention.head_dim,
        dtype=weight.dtype, device=weight.device,
    )  # fmt: skip


def next_logits(
    model, ids: Tensor, padding_mask: Tensor | None, cache: KVCache | None
) -> Float[Tensor, "batch vocab_size"]:
    """Scores for the token after `ids`, reading only what the cache has not read yet."""
    window = model.cfg["context_length"]
    if cache is None or ids.shape[1] > window:
        mask = None if padding_mask is None else padding_mask[:, -window:]
        return model(ids[:, -window:], mask)[:, -1]
    return model(ids[:, cache.length :], padding_mask, cache)[:, -1]


def sample(
    logits: Float[Tensor, "batch vocab_size"],
    temperature: float = 0.0,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "batch"]:
    """One token id for each row. The order is the usual one: temperature, top-k, top-p, draw."""
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    probabilities = filtered_probabilities(logits, temperature, top_k=top_k, top_p=top_p)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


def filtered_probabilities(
    logits: Float[Tensor, "batch vocab_size"],
    temperature: float,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Float[Tensor, "batch vocab_size"]:
    """The distribution that `sample` draws from: what was cut has probability 0, the rest sums to 1."""
    # softmax does not change when a row is shifted; from the maximum down, a tiny temperature cannot overflow
    logits = (logits.float() - logits.float().amax(dim=-1, keepdim=True)) / max(temperature, 1e-30)
    if top_k is not None and top_k < logits.shape[-1]:
        kept = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, float("-inf")).scatter(-1, kept.indices, kept.values)
    probabilities = torch.softmax(logits, dim=-1)
    if top_p is not None and top_p < 1:  # at 1 nothing is cut, though the rounded sums below reach 1 too early
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered  # mass of the likelier tokens: 0 for the first, which always stays
        kept = torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(before >= top_p, 0.0))
        probabilities = kept / kept.sum(dim=-1, keepdim=True)
    return probabilities


def check_arguments(model, ids, max_new_tokens, temperature, top_k, top_p, stops, pad_token, padding_mask) -> None:
    """Raise one ValueError that lists everything wrong with a call of generate()."""
    problems, vocab_size = [], model.cfg["vocab_size"]
    whole = {"max_new_tokens": max_new_tokens, "top_k": top_k}
    numbers = {"temperature": temperature, "top_p": top_p} | whole
    wrong = [name for name, value in numbers.items() if not isinstance(value, Real) and value is not None]
    wrong += [name for name, value in whole.items() if isinstance(value, Real) and not isinstance(value, Integral)]
    wrong += [name for name in ("temperature", "max_new_tokens") if numbers[name] is None]
    if wrong:
        named = ", ".join(f"{name}={numbers[name]!r}" for name in wrong)
        raise TypeError(f"generate() takes numbers, whole ones for max_new_tokens and top_k: got {named}.")
    if ids.ndim != 2 or ids.shape[1] == 0:
        problems.append(
            f"ids must be (B, T) with T >= 1: a prompt of one token at least (one text is ids[None]), got "
            f"{tuple(ids.shape)}."
        )
    if max_new_tokens < 0:
        problems.append(f"max_new_tokens must be 0 or more, got {max_new_tokens}.")
    if not 0 <= temperature < float("inf"):
        problems.append(f"temperature must be 0 (greedy) or a positive number, got {temperature}.")
    if top_k is not None and top_k < 1:
        problems.append(f"top_k must be 1 or more, or None, got {top_k}.")
    if top_p is not None and not 0 < top_p <= 1:
        problems.append(f"top_p must be above 0 and at most 1, or None, got {top_p}.")
    for token in [*stops, *([] if pad_token is None else [pad_token])]:
        if not 0 <= token < vocab_size:
            problems.append(f"stop and pad tokens must be in 0..{vocab_size - 1}, got {token}.")
    if padding_mask is not None and ids.ndim == 2:
        try:
            check_padding_mask(padding_mask, ids.shape[1], ids.shape[0])
        except (TypeError, ValueError) as error:
            problems.append(str(error))
        else:
            if not bool(padding_mask[:, -1:].all()):
                problems.append(
                    "the last token of a row is padding: pad prompts on the left, so that each ends in a real token."
                )
    if problems:
        raise ValueError("generate() cannot run:\n" + "\n".join(f"  - {problem}" for problem in problems))
