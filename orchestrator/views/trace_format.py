"""One plain-data form of a trace: what a page, a stepper or any other program needs, as JSON.

`trace_data` writes it, the functions below it read it. What is kept, and how well:

    attention weights    every layer and head, in steps of 1 / 65,534 (16 bits): off by at most 7.7e-6
    attention scores     the same places; the steps of each head go from its lowest to its highest score
    next tokens          the `TOP` likeliest at each position, and the logarithm of the softmax's denominator over the
                         *whole* vocabulary for each of `TEMPERATURES`: so a probability is right at every temperature
                         that can be chosen, to a relative 4e-6, whatever the size of the vocabulary
    logit lens           the `LENS_TOP` likeliest tokens after each block, if a model is given
    norms, statistics    six digits
    hidden keys          a bit for each cell, one table where all heads hide the same

Attention is stored as the lower triangle where nothing lies above the diagonal, and whole where something does.
"""

import base64
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from GPT2Model.weights.weight_formats import unlike_gpt2
from orchestrator.views.checks import check_model, check_tokenizer, check_trace
from orchestrator.views.trace_figures import hidden_keys

FORMAT, VERSION = "gpt2-trace", 1
TEMPERATURES = tuple(round(0.05 * i, 2) for i in range(1, 41))  # 0.05 to 2.00
TOP, LENS_TOP = 40, 5
LIMIT = 8_000_000  # attention weights: above it a page would have over 40 MB
STATISTICS = ("mean", "std", "min", "max", "rms", "zeros", "nans")


class NextToken(NamedTuple):
    """One candidate for the next token: its id, its text, its logit below the largest, its probability."""

    id: int
    text: str
    below: float
    probability: float


def trace_data(trace, model=None, tokenizer=None, sequence: int = 0, *, bits: int = 16) -> dict:
    """What pages show of a trace, as a dict that `json.dumps` takes.

    Why: the stepper and the HTML page read the same numbers from the same place, so they cannot disagree.

    Args:
        trace: from `GPT2Model.tracing.trace`, with attention weights of every layer (fused implementations form none:
            `trace(..., recompute=True)`).
        model: the model of the trace, for the logit lens; None: the page has no lens.
        tokenizer: what turns ids into text; None: GPT-2's own where the vocabulary is GPT-2's, else ids are shown.
        sequence: which row of the batch.
        bits: 16, or 8 for a page of half the size: weights are then off by up to 0.002.
    Raises:
        TypeError: arguments in another order, or of another kind.
        ValueError: no attention weights in the trace, a number that is not finite, a row that is not there, too much,
            or a model that is not the trace's.
    """
    check_trace(trace)
    check_tokenizer(tokenizer)
    rows, tokens = trace.ids.shape
    if not 0 <= sequence < rows:
        raise ValueError(f"sequence={sequence}: the trace has {rows} rows, counted from 0.")
    if bits not in (8, 16):
        raise ValueError(f"bits={bits}: a weight is stored in 8 or 16 bits.")
    layers = trace.cfg["n_layers"]
    weights = attention_tensors(trace, "weights", sequence)
    if weights is None:
        raise ValueError(
            f"the attention weights of all {layers} layers are not in this trace: {trace.implementation} forms none, "
            "or names= left them out. Do: trace(model, text, recompute=True), without names=."
        )
    if weights.min() < 0 or weights.max() > 1 + 1e-5:
        raise ValueError(
            f"attention weights lie between 0 and 1, and these between {weights.min():.3g} and {weights.max():.3g}: "
            "were they patched? Patch the scores or the context instead; a page could not show these."
        )
    if weights.size > LIMIT:
        raise ValueError(
            f"{weights.size:,} attention weights ({layers} layers, {weights.shape[1]} heads, {tokens} tokens) are more "
            f"than a page can show: at most {LIMIT:,}. Trace a shorter text."
        )
    logits = checked(trace.logits[sequence], "logits").double()
    if model is not None:
        check_model(model, trace)
    decode = decoder(tokenizer, trace.cfg["vocab_size"])
    ids = trace.ids[sequence].tolist()
    following = next_token_data(logits, ids)
    lens = lens_data(model, trace, sequence) if model is not None else None
    shown = {*ids, *(i for row in following["top"] for i in row)}
    shown |= {i for layer in (lens or {"top": []})["top"] for row in layer for i, _ in row}
    return {
        "format": FORMAT,
        "version": VERSION,
        "cfg": dict(trace.cfg),
        "unlike_gpt2": unlike_gpt2(trace.cfg),
        "ids": ids,
        "tokens": list(trace.tokens[sequence]),
        "text": decode(ids),
        "implementation": trace.implementation,
        "recomputed": any(trace.values[name].recomputed for name in layer_names(trace, "attention.weights")),
        "attention": attention_data(weights, attention_tensors(trace, "scores", sequence), bits)
        | hidden_data(trace, weights, sequence),
        "next": following,
        "lens": lens,
        "norms": norm_data(trace, sequence),
        "tensors": [tensor_data(value) for name, value in trace.values.items() if "tile[" not in name],
        "vocabulary": {str(i): decode([i]) for i in sorted(shown)},
    }


def layer_names(trace, part: str) -> list[str]:
    return [f"blocks.{i}.{part}" for i in range(trace.cfg["n_layers"])]


def checked(tensor: Tensor, name: str) -> Tensor:
    """The tensor on the CPU; an error if a number in it is not finite, since JSON and a colour know no NaN."""
    tensor = tensor.detach().float().cpu()
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(
            f"{name} of the trace holds NaN or infinity, and no page can draw that. print(trace) counts the NaNs of "
            "every tensor: the first that has any is where it begins."
        )
    return tensor


def attention_tensors(trace, part: str, sequence: int) -> np.ndarray | None:
    """(n_layers, n_heads, T, T) weights or scores; None unless the trace has them for every layer."""
    names = layer_names(trace, f"attention.{part}")
    if not all(name in trace.values for name in names):
        return None
    return torch.stack([checked(trace.values[name].tensor[sequence], name) for name in names]).numpy()


def attention_data(weights: np.ndarray, scores: np.ndarray | None, bits: int) -> dict:
    """Weights and scores in `bits` bits, with what is needed to read them back and how far they may be off."""
    layers, heads, tokens, _ = weights.shape
    triangle = not np.triu(weights, 1).any()
    steps = 2**bits - 2  # an even number of steps: 0, 1/2 and 1 are exact
    data = {
        "layers": layers, "heads": heads, "tokens": tokens, "bits": bits, "triangle": triangle, "steps": steps,
        "error": float(f"{0.5 / steps + 2e-8:.2g}"), "weights": packed(weights * steps, bits, triangle), "scores": None,
    }  # fmt: skip
    if scores is not None:
        places = np.tril(np.ones((tokens, tokens), bool)) if triangle else np.ones((tokens, tokens), bool)
        kept = scores.astype(np.float64)[..., places]
        low, high = kept.min(-1), kept.max(-1)
        step = np.maximum(high - low, 1e-9) / steps
        data["scores"] = packed((scores - low[..., None, None]) / step[..., None, None], bits, triangle)
        data["score_low"], data["score_step"] = low.tolist(), step.tolist()
    return data


def hidden_data(trace, weights: np.ndarray, sequence: int) -> dict:
    """Which cells a mask hides, as the figures see it: a weight of 0 because nobody asked, not because it did not fit.

    A bit for each cell, the first in the highest bit of a byte; each table begins with a byte of its own.
    """
    layers, heads, tokens, _ = weights.shape
    tables = [hidden_keys(trace, layer, head, sequence) for layer in range(layers) for head in range(heads)]
    hidden = np.stack(tables) & (weights.reshape(-1, tokens, tokens) == 0)  # a patch may have put a weight there
    if (hidden == hidden[0]).all():
        hidden = hidden[:1]
    bits = np.packbits(hidden.reshape(len(hidden), -1), axis=1)
    return {"masks": len(hidden), "hidden": base64.b64encode(bits.tobytes()).decode("ascii")}


def packed(values: np.ndarray, bits: int, triangle: bool) -> str:
    """Whole numbers, little-endian, row by row (of the lower triangle), as base64."""
    tokens = values.shape[-1]
    kept = values[..., *np.tril_indices(tokens)] if triangle else values
    codes = np.rint(np.clip(kept, 0, 2**bits - 1)).astype("<u2" if bits == 16 else "u1")
    return base64.b64encode(codes.tobytes()).decode("ascii")


def next_token_data(logits: Tensor, ids: list[int]) -> dict:
    """The likeliest next tokens at each position, and what their probabilities at each temperature need.

    The largest logit of a position is subtracted: softmax does not change, and digits are kept for what matters.
    """
    largest = logits.amax(dim=-1, keepdim=True)
    below = logits - largest  # (T, V), 0 at most
    top = below.topk(min(TOP, logits.shape[-1]), dim=-1)
    denominators = torch.stack([torch.logsumexp(below / temperature, dim=-1) for temperature in TEMPERATURES], dim=-1)
    texts = []  # what the text really goes on with
    for position, token in enumerate(ids[1:]):
        own = below[position, token]
        texts.append([token, round(own.item(), 7), int((below[position] > own).sum()) + 1])
    return {
        "temperatures": list(TEMPERATURES),
        "vocab_size": logits.shape[-1],
        "largest": [round(value, 5) for value in largest.flatten().tolist()],
        "top": top.indices.tolist(),
        "below": rounded(top.values, 7),
        "log_denominator": rounded(denominators, 7),
        "actual": [*texts, None],
    }


def rounded(tensor: Tensor, digits: int) -> list[list[float]]:
    return [[round(value, digits) + 0.0 for value in row] for row in tensor.tolist()]  # + 0.0: no -0.0


@torch.no_grad()
def lens_data(model, trace, sequence: int) -> dict | None:
    """What the model would say next if it stopped after each block: final norm and head on the stream there."""
    names = [name for name in ("embeddings", *layer_names(trace, "output")) if name in trace.values]
    if not names:
        return None
    model = getattr(model, "_orig_mod", model)  # of a compiled model the one inside
    weight, top = model.head.weight, []
    for name in names:
        stream = trace.values[name].tensor[sequence][None].to(weight)
        best = torch.softmax(model.head(model.final_norm(stream))[0].double(), dim=-1).topk(
            min(LENS_TOP, weight.shape[0]), dim=-1
        )
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        top.append([[[i, round(p, 6)] for i, p in zip(*pair, strict=True)] for pair in pairs])
    return {"names": names, "top": top}


def norm_data(trace, sequence: int) -> dict:
    """How long each token's vector in the stream is: after the embeddings, after each attention, after each block."""
    order = ["embeddings"]
    for pair in zip(layer_names(trace, "after_attention"), layer_names(trace, "output"), strict=True):
        order += pair
    names = [name for name in order if name in trace.values]
    norms = [checked(trace.values[name].tensor[sequence], name).double().norm(dim=-1).tolist() for name in names]
    return {"names": names, "values": [[digits(value) for value in row] for row in norms]}


def tensor_data(value) -> dict:
    statistics = value.statistics()
    return {
        "name": value.name,
        "axes": list(value.axes),
        "shape": list(value.tensor.shape),
        "about": value.about,
        "recomputed": bool(value.recomputed),
        "patched": bool(value.patched),
        **{key: digits(statistics[key]) for key in STATISTICS if key in statistics},
    }


def digits(number: float) -> float | int | str:
    """Six digits; NaN and infinity as text, since JSON has no name for them."""
    if isinstance(number, int):
        return number
    return float(f"{number:.6g}") if math.isfinite(number) else str(number)


def decoder(tokenizer, vocab_size: int):
    """A function from ids to their text: the tokenizer's, GPT-2's own, or the numbers themselves."""
    if tokenizer is None and vocab_size == 50257:
        from GPT2Model.tokenizer import get_tokenizer

        tokenizer = get_tokenizer()
    return tokenizer.decode if tokenizer is not None else lambda ids: " ".join(map(str, ids))


# Readers -------------------------------------------------------------------------------------------------------------


def head_weights(data: dict, layer: int, head: int) -> np.ndarray:
    """(T, T) attention weights of one head, as they were stored."""
    return unpacked(data, "weights", layer, head) / data["attention"]["steps"]


def head_scores(data: dict, layer: int, head: int) -> np.ndarray | None:
    """(T, T) scaled scores of one head before the mask; NaN where none is kept, None if the trace had none."""
    attention = data["attention"]
    if attention["scores"] is None:
        return None
    low, step = attention["score_low"][layer][head], attention["score_step"][layer][head]
    scores = low + unpacked(data, "scores", layer, head) * step
    if attention["triangle"]:
        scores[np.triu_indices(attention["tokens"], 1)] = np.nan
    return scores


def head_hidden(data: dict, layer: int, head: int) -> np.ndarray:
    """(T, T) bool: the keys that the mask hides from each query of one head."""
    attention = data["attention"]
    check_head(attention, layer, head)
    cells = attention["tokens"] ** 2
    tables = np.frombuffer(base64.b64decode(attention["hidden"]), dtype="u1").reshape(attention["masks"], -1)
    table = tables[layer * attention["heads"] + head if attention["masks"] > 1 else 0]
    return np.unpackbits(table, count=cells).astype(bool).reshape(attention["tokens"], -1)


def check_head(attention: dict, layer: int, head: int) -> None:
    if not (0 <= layer < attention["layers"] and 0 <= head < attention["heads"]):
        raise ValueError(
            f"layer {layer}, head {head}: this trace has layers 0 to {attention['layers'] - 1} and heads 0 to "
            f"{attention['heads'] - 1}."
        )


def unpacked(data: dict, part: str, layer: int, head: int) -> np.ndarray:
    attention = data["attention"]
    check_head(attention, layer, head)
    tokens = attention["tokens"]
    size = tokens * (tokens + 1) // 2 if attention["triangle"] else tokens * tokens
    codes = np.frombuffer(base64.b64decode(attention[part]), dtype="<u2" if attention["bits"] == 16 else "u1")
    start = (layer * attention["heads"] + head) * size
    whole = np.zeros((tokens, tokens))
    places = np.tril_indices(tokens) if attention["triangle"] else np.indices((tokens, tokens)).reshape(2, -1)
    whole[tuple(places)] = codes[start : start + size]
    return whole


def looked_at(data: dict, layer: int, head: int, token: int, count: int = 5) -> list[tuple[int, float]]:
    """(position, weight) of what a token attends to most in one head, the largest first."""
    row = head_weights(data, layer, head)[token]
    return [(int(position), float(row[position])) for position in np.argsort(-row, kind="stable")[:count]]


def next_tokens(data: dict, position: int, temperature: float = 1.0, count: int = 10) -> list[NextToken]:
    """The likeliest tokens after `position`, with their probabilities at a temperature.

    Raises:
        ValueError: a temperature for which nothing is stored.
    """
    following = data["next"]
    distances = [abs(temperature - known) for known in following["temperatures"]]
    index = int(np.argmin(distances))
    if distances[index] > 1e-9:
        low, high = following["temperatures"][0], following["temperatures"][-1]
        raise ValueError(f"temperature {temperature}: stored are {low:.2f} to {high:.2f} in steps of 0.05.")
    denominator = following["log_denominator"][position][index]
    pairs = zip(following["top"][position][:count], following["below"][position], strict=False)
    return [
        NextToken(i, data["vocabulary"][str(i)], below, math.exp(below / temperature - denominator))
        for i, below in pairs
    ]


def tensors_of_layer(data: dict, layer: int) -> list[dict]:
    """The tensors of one block, in order of computation."""
    return [tensor for tensor in data["tensors"] if tensor["name"].startswith(f"blocks.{layer}.")]
