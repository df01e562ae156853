"""How unsure is a model of a text? Perplexity by windows that slide over it, and what int8 or bfloat16 add to it.

    python -m orchestrator perplexity --model runs/tales --text FILE
    python -m orchestrator perplexity --model gpt2 --text FILE --stride 512           half a window of context, at least
    python -m orchestrator perplexity --model gpt2 --text FILE --stride 128 512 1024  what more context is worth
    python -m orchestrator perplexity --model tales --text tales --int8               8-bit weights against float32
    python -m orchestrator perplexity --model gpt2 --text FILE --dtype bfloat16 --int8 --out runs/precision

Windows, and the tokens predicted in each, are those of transformers' page "Perplexity of fixed-length models". What the
figures mean is printed with them. What is not float32 is held against float32, unless --only says otherwise.
"""

import argparse
import copy
import math
import os
import shlex
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import torch
from tqdm import tqdm

from CMHA.choosing import announce, canonical_name
from GPT2Model.quantization import quantize_int8, weight_bytes
from GPT2Model.tokenizer import END_OF_TEXT
from orchestrator.evaluation.machine import check_device, machine_facts
from orchestrator.evaluation.perplexity import Perplexity, check, perplexity, windows_of
from orchestrator.opened import DTYPE_NAMES, DTYPES, SOURCES, read_model, resolve_dtype, unannounced
from orchestrator.report import make_folder, plain
from orchestrator.text.corpora import TalesCorpus, read_text
from orchestrator.views.perplexity_figures import perplexity_by_stride

HELP = "the perplexity of a text by sliding windows, and what int8 weights or bfloat16 add to it"
TALES_TEXT, PAGED = "tales", "paged_attention"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Numbers are read as text, so that everything that is wrong can be said at once."""
    parser.add_argument("--model", default=None, metavar="MODEL", help=SOURCES)
    parser.add_argument(
        "--text",
        default=None,
        metavar="FILE",
        help="a UTF-8 file, a folder of them, python-docs, or tales: 200 stories that were held out",
    )
    parser.add_argument(
        "--stride",
        nargs="+",
        action="extend",
        default=None,
        metavar="N",
        help="tokens that a window moves on; several are measured one after the other (default: --max_length)",
    )
    parser.add_argument(
        "--max_length", default=None, metavar="N", help="tokens in a window (default: the model's context)"
    )
    parser.add_argument(
        "--documents",
        action="store_true",
        help="read each document by itself, as split at the end-of-text mark, after that mark; always so for tales",
    )
    parser.add_argument("--limit", default=None, metavar="N", help="read the first N tokens of the text only")
    parser.add_argument(
        "--dtype",
        default="float32",
        metavar="NAME",
        help=f"{', '.join(DTYPE_NAMES)}, or bf16, fp16, fp32 (default: float32)",
    )
    parser.add_argument("--int8", action="store_true", help="also with the large matrices in 8 bits")
    parser.add_argument(
        "--only", action="store_true", help="measure what is asked for alone, without float32 beside it"
    )
    parser.add_argument("--batch_size", default="8", metavar="N", help="windows computed together (default: 8)")
    parser.add_argument("--attn_implementation", default=None, metavar="NAME", help="auto, eager, sdpa, ...")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto: the best here (default)")
    parser.add_argument("--out", default=None, metavar="DIR", help="folder for report.json and a figure")


def run(args: argparse.Namespace) -> int:
    asked = read_arguments(args)
    folder = None if args.out is None else make_folder(args.out)
    text, floor = the_text(args.text)
    with unannounced():
        model, tokenizer = read_model(args.model)
        if args.attn_implementation is not None:
            model.eval().set_attention(args.attn_implementation)
    ids, documents = encoded(text, tokenizer, args.documents or floor is not None)
    if asked["limit"] is not None and asked["limit"] < len(ids):
        ids, documents, floor = *cut(ids, documents, asked["limit"]), None
        text = tokenizer.decode(ids)
    max_length = asked["max_length"] or model.cfg["context_length"]
    strides = asked["strides"] or [max_length]
    refuse_together(model, ids, strides, max_length, asked["batch_size"], documents)

    size, words = sizes(text)
    print(f"model: {args.model}, {model.num_parameters():,} parameters, context {model.cfg['context_length']} tokens")
    several = ""
    if documents is not None:
        several = f", {len(documents):,} document{'s' * (len(documents) != 1)}, each read by itself"
    print(f"text: {args.text}, {len(ids):,} tokens, {size:,} bytes, {words:,} words{several}")
    rows = measure(model, ids, documents, strides, max_length, asked)
    for row in rows:
        found = row["perplexity"]
        row |= {"bits_per_byte": found.bits_per_byte(size), "per_word": found.per_word(words)}
    print("\n".join(["", *table(rows), "", *definition(rows, floor)]))
    if folder is not None:
        leave(folder, args, asked["device"], rows, {"tokens": len(ids), "bytes": size, "words": words, "floor": floor})
    return 0


def read_arguments(args: argparse.Namespace) -> dict:
    """What the arguments ask for.

    Raises:
        ValueError: all that is wrong with them, one line each.
    """
    problems = []

    def attempt(function: Callable, *values):
        try:
            return function(*values)
        except ValueError as error:
            problems.append(str(error))
            return None

    for option in ("model", "text"):
        if not getattr(args, option):
            takes = {"model": SOURCES, "text": "a UTF-8 file, a folder, python-docs or tales"}[option]
            problems.append(f"--{option} is needed: {takes}.")
    strides = [attempt(whole_number, "stride", stride) for stride in args.stride or ()]
    numbers = {
        name: None if getattr(args, name) is None else attempt(whole_number, name, getattr(args, name))
        for name in ("max_length", "limit", "batch_size")
    }
    device = attempt(check_device, args.device)
    dtype = attempt(resolve_dtype, args.dtype, device) if device is not None else None
    if args.attn_implementation is not None and attempt(canonical_name, args.attn_implementation) == PAGED:
        problems.append(
            f"--attn_implementation {args.attn_implementation} is for writing: nothing is kept in pages here."
        )
    if args.out and not writable(Path(args.out)):
        problems.append(f"--out {args.out} is not a folder that can be written: choose another.")
    if problems:
        alone = len(problems) == 1
        raise ValueError(problems[0] if alone else "\n  - ".join(["this cannot be measured:", *problems]))
    asked_for = [(dtype, False), (dtype, True)] if args.int8 and not args.only else [(dtype, args.int8)]
    precisions = asked_for if args.only or ("float32", False) in asked_for else [("float32", False), *asked_for]
    return {"strides": sorted(set(strides)), "device": device, "precisions": precisions, **numbers}


def whole_number(option: str, text: str) -> int:
    if option == "stride" and "," in text:
        raise ValueError(
            f"--stride takes several numbers with spaces: --stride {text.replace(',', ' ')}, got {text!r}."
        )
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ValueError(f"--{option} must be a whole number, 1 or more, got {text!r}.")
    return int(text)


def writable(folder: Path) -> bool:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK)


def the_text(name: str) -> tuple[str, float | None]:
    """A text, and the nats per token that a perfect model would pay for it, where those are known."""
    if name == TALES_TEXT and not Path(name).exists():
        corpus = TalesCorpus(held_out=200)
        return END_OF_TEXT + "".join(story + END_OF_TEXT for story in corpus.held_out), corpus.floor
    try:
        return read_text(name), None
    except ValueError as error:
        raise ValueError(
            str(error).replace("give it some text to learn from", "there is nothing to measure")
        ) from error


def sizes(text: str) -> tuple[int, int]:
    """UTF-8 bytes and words of a text; the marks between its documents are neither. At least 1 of both."""
    said = text.replace(END_OF_TEXT, " ")
    return max(1, len(text.replace(END_OF_TEXT, "").encode(errors="replace"))), max(1, len(said.split()))


def encoded(text: str, tokenizer, apart: bool) -> tuple[torch.Tensor, list[int] | None]:
    """Token ids; and, if its documents are read apart, the length of each, with a mark before and behind it."""
    if not apart:
        return torch.tensor(tokenizer.encode(text), dtype=torch.int64), None
    end = tokenizer.end_of_text
    if end is None:
        raise ValueError("this model's tokenizer has no mark between documents: leave --documents out.")
    rows = [[end, *tokenizer.encode(document), end] for document in text.split(END_OF_TEXT) if document.strip()]
    return torch.tensor([i for row in rows for i in row], dtype=torch.int64), [len(row) for row in rows]


def cut(ids: torch.Tensor, documents: list[int] | None, limit: int) -> tuple[torch.Tensor, list[int] | None]:
    """The first `limit` tokens, and what is left of the documents: of the last, two tokens or nothing."""
    if documents is None:
        return ids[:limit], None
    kept, left = [], limit
    for length in documents:
        if left < 2:
            break
        kept.append(min(length, left))
        left -= kept[-1]
    return ids[: sum(kept)], kept


def refuse_together(model, ids, strides: list[int], max_length: int, batch_size: int, documents) -> None:
    problems = {}
    for stride in strides:
        try:
            check(model, ids, stride, max_length, batch_size, documents)
        except ValueError as error:
            problems[str(error)] = None
    if problems:
        raise ValueError("\n".join(problems))


def measure(model, ids: torch.Tensor, documents, strides: list[int], max_length: int, asked: dict) -> list[dict]:
    """A row for each precision and stride; the model is in the last precision afterwards."""
    precisions, device = asked["precisions"], asked["device"]
    slid = [window for stride in strides for window in windows_of(documents or [len(ids)], stride, max_length)]
    total = sum(window.end - window.begin for window in slid) * len(precisions)
    settings = {"max_length": max_length, "batch_size": asked["batch_size"], "documents": documents}
    rows = []
    announce(model.blocks[0].attention.choice())
    with tqdm(total=total, unit="token", unit_scale=True, file=sys.stderr) as bar:
        for i, (dtype, int8) in enumerate(precisions):
            bar.set_postfix_str(label(dtype, int8), refresh=False)
            last = i == len(precisions) - 1
            one = quantize_int8(model) if int8 else model if last else copy.deepcopy(model)
            one = one.to(device=device, dtype=DTYPES[dtype])
            for stride in strides:
                started = time.perf_counter()
                found = perplexity(one, ids, stride=stride, **settings, tick=bar.update)
                row = {"precision": label(dtype, int8), "perplexity": found, "weight_bytes": weight_bytes(one)}
                rows.append({**row, "seconds": time.perf_counter() - started})
    return rows


def label(dtype: str, int8: bool) -> str:
    return f"int8 weights, {dtype}" if int8 else dtype


def table(rows: list[dict]) -> list[str]:
    """The figures side by side; each against the first precision's at the same stride."""
    first = {row["perplexity"].stride: row for row in reversed(rows) if row["precision"] == rows[0]["precision"]}
    lines = [
        f"{'precision':22} {'stride':>6} {'context':>7} {'nats/token':>11} {'perplexity':>11} {'change':>9} "
        f"{'bits/byte':>10} {'per word':>9} {'tokens read':>12} {'seconds':>8} {'weights':>10}"
    ]
    for row in rows:
        found: Perplexity = row["perplexity"]
        base = first[found.stride]["perplexity"]
        change = "" if found is base else f"{100 * (math.exp(found.nats_per_token - base.nats_per_token) - 1):+.3f} %"
        lines.append(
            f"{row['precision']:22} {found.stride:>6} {found.least_context:>7} {found.nats_per_token:>11.6f} "
            f"{found.perplexity:>11.4f} {change:>9} {row['bits_per_byte']:>10.4f} {row['per_word']:>9.4g} "
            f"{found.tokens_read:>12,} {row['seconds']:>8.1f} {row['weight_bytes'] / 2**20:>6.1f} MiB"
        )
    return lines


def definition(rows: list[dict], floor: float | None) -> list[str]:
    """What the figures mean, for those who read no more than them."""
    founds = [row["perplexity"] for row in rows]
    one, lines = founds[0], []
    beside = one.max_length
    lines += [
        "perplexity: exp of nats/token, the mean negative log-likelihood in nats of the predicted tokens,",
        "  each of them once, given the tokens before it in its window.",
        f"windows: {beside} tokens at most, each begins `stride` tokens after the one before.",
        "context: tokens that stood before each predicted token at least; in the first window fewer, from 1 on.",
    ]
    strides = {found.stride: found.predicted for found in founds}
    counts = "; ".join(f"stride {stride}: {count:,} of {one.tokens:,} tokens" for stride, count in strides.items())
    begin = "the mark that opens each document" if one.documents else "the first token of the text"
    apart = f"; and with stride {beside}, where windows do not overlap, the first token of each"
    lines += [
        f"predicted: {counts}.",
        f"  Not predicted: {begin}{apart if beside in strides else ''}.",
        "Perplexities per token cannot be compared between tokenizers, whose tokens are not the same pieces of text.",
        "  bits/byte (of UTF-8) and perplexity per word can: all tokens at their mean cost; marks are no text.",
    ]
    off = {
        found.stride: found.by_transformers_loop
        for found in founds[: len(strides)]
        if not one.documents and not math.isclose(found.by_transformers_loop, found.perplexity, rel_tol=1e-9)
    }
    if off:
        values = ", ".join(f"{value:.4f} at stride {stride}" for stride, value in off.items())
        lines += [
            f"The loop on transformers' page prints {values} for {rows[0]['precision']}: the same windows,",
            "  of which it weighs each but the first with one token fewer than it predicts.",
        ]
    if floor is not None:
        lines.append(f"floor: a perfect model pays {floor:.6f} nats/token, perplexity {math.exp(floor):.4f}: exact.")
    return lines


def leave(folder: Path, args: argparse.Namespace, device: str, rows: list[dict], text: dict) -> None:
    """report.json and a figure."""
    import json

    from GPT2Model.files import replace_file, replace_text

    report = {
        "command": shlex.join(["python", "-m", "orchestrator", *sys.argv[1:]]),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": machine_facts(device),
        "arguments": {name: value for name, value in vars(args).items() if name != "command"},
        "definition": definition(rows, text["floor"]),
        "text": text,
        "rows": [{**row, **row["perplexity"].as_dict()} for row in rows],
    }
    replace_text(folder / "report.json", json.dumps(plain(report), indent=2) + "\n")
    figure = perplexity_by_stride(report["rows"], title=f"{args.model} reading {args.text}", floor=text["floor"])
    replace_file(folder / "perplexity.png", lambda beside: figure.savefig(beside, format="png", dpi=130))
    print(f"written: {folder}/report.json, perplexity.png")
