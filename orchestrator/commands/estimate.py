"""What would a model cost? Parameters, FLOPs, memory and speed by formula, before anything is built or run.

    python -m orchestrator estimate --model gpt2-xl --batch_size 8 --max_length 1024 --dtype bf16
    python -m orchestrator estimate --model gpt2 --batch_size 16 --device A100 --tokens_per_second 142000
    python -m orchestrator estimate --model gpt2 --batch_size 4 --activation_checkpointing --loss_chunk_tokens 512
    python -m orchestrator estimate --model gpt2 --norm rmsnorm --mlp swiglu --positions rope --n_kv_heads 4

Each number stands beside its formula. The options are those of train.py, and mean the same; --device may also name a
chip that is not here. Memory is what tensors hold at the worst moment: the tests hold it within 10 % of what torch's
allocator sees on a CPU, without torch.compile, for a plain causal mask. On a GPU the formula differs in what torch's
kernels there keep of dropout and softmax; it was not measured there, and CUDA itself takes some hundred MiB more.
"""

import argparse
import json
import shlex
import sys
import textwrap
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from CMHA.choosing import canonical_name
from CMHA.choosing.choose import AttentionSettings, decide, reads_pages, reasons_against
from CMHA.choosing.names import AUTO
from CMHA.request import AttentionRequest
from GPT2Model.config import KEYS, from_preset
from GPT2Model.files import replace_text
from GPT2Model.gpt2 import GPTModel
from orchestrator.evaluation import estimates
from orchestrator.evaluation.machine import check_device
from orchestrator.evaluation.training_memory import PARTS, moments, training_peak
from orchestrator.evaluation.training_step import DTYPES, OPTIMIZERS, TrainingStep, block_activations
from orchestrator.report import make_folder, plain
from orchestrator.training import mfu
from orchestrator.training.precision import TORCH_DTYPES, resolve_dtype

HELP = "parameters, FLOPs, memory and MFU of a model by formula, before it is built"
SIZES = ("n_layers", "n_heads", "n_kv_heads", "emb_dim", "vocab_size")
VARIANTS = {name: KEYS[name].choices for name in ("norm", "mlp", "positions")}
PARTS_OF_PEAK = (0.2, 0.4, 0.6)  # MFUs of which the speed is given; 40 to 60 % is what good training reaches on a GPU
Row = tuple[str, str, str]  # what, number with unit, formula
HERE = ("auto", "cpu", "cuda", "mps")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All values are read as text, so that everything that is wrong can be said at once."""
    options = {
        "--model": ("gpt2", "NAME", "a preset, or a folder with weights"),
        "--batch_size": ("8", "N", "sequences in one forward pass"),
        "--max_length": (None, "N", "tokens in a sequence (default: the model's context_length)"),
        "--dtype": ("auto", "NAME", f"of the matrix products: {', '.join(DTYPES)}, or auto: what the device does best"),
        "--attn_implementation": ("auto", "NAME", "auto, eager, sdpa, flash_tiled, flash_attention_2, ..."),
        "--gradient_accumulation_steps": ("1", "N", "forward and backward passes in one step"),
        "--loss_chunk_tokens": ("0", "N", "the loss over so many tokens at a time; 0: all at once"),
        "--optimizer": ("adamw", "NAME", f"{', '.join(OPTIMIZERS)}: one that remembers nothing"),
        "--n_layers": (None, "N", "another depth than the model's"),
        "--n_heads": (None, "N", "another number of heads"),
        "--n_kv_heads": (None, "N", "key-value heads, each shared by a group of heads"),
        "--emb_dim": (None, "N", "another width"),
        "--vocab_size": (None, "N", "another vocabulary"),
        "--norm": (None, "NAME", f"{' or '.join(VARIANTS['norm'])}, instead of the model's"),
        "--mlp": (None, "NAME", f"the feed-forward layer: {' or '.join(VARIANTS['mlp'])}, instead of the model's"),
        "--positions": (None, "NAME", f"{' or '.join(VARIANTS['positions'])}, instead of the model's"),
        "--drop_rate": (None, "X", "dropout (default: 0, as train.py has it for fresh weights)"),
        "--device": ("auto", "NAME", "cpu, cuda, mps, auto: the best here; or a chip: A100, H100, H100 PCIe, T4, ..."),
        "--peak_tflops": (None, "X", "the device's peak in TFLOP/s, instead of the table's or a measured one"),
        "--tokens_per_second": (None, "X", "give the MFU of training at this speed"),
        "--out": (None, "DIR", "folder for estimate.json"),
    }
    for option, (default, metavar, text) in options.items():
        shown = "" if default is None else f" (default: {default})"
        parser.add_argument(option, default=default, metavar=metavar, help=text + shown)
    parser.add_argument(
        "--activation_checkpointing", action="store_true", help="blocks keep their input, and are computed again"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, on stdout")


def run(args: argparse.Namespace) -> int:
    step, attention, peak, speed = read_arguments(args)
    facts = estimate(step, peak, speed)
    facts = {"command": shlex.join(["python", "-m", "orchestrator", *sys.argv[1:]]), "attention": attention, **facts}
    text = json.dumps(plain(facts), indent=2) + "\n"
    if args.out is not None:
        replace_text(make_folder(args.out) / "estimate.json", text)
    print(text.rstrip("\n") if args.json else page(args.model, step, attention, peak, facts))
    if args.out is not None and not args.json:
        print(f"\nwritten: {Path(args.out) / 'estimate.json'}")
    return 0


def read_arguments(args: argparse.Namespace) -> tuple[TrainingStep, str, mfu.Peak, float | None]:
    """The step that is asked about, in words what computes attention in it, the peak, and the speed, if one is given.

    Raises:
        ValueError: all that is wrong with the numbers, one line each; then what is wrong with names.
    """
    problems: list[str] = []

    def read(name: str, kind: Callable, least: float, below: float = float("inf")):
        given = getattr(args, name)
        if given is None:
            return None
        try:
            number = kind(given)
        except ValueError:
            number = None
        if number is None or not least <= number < below:
            what = "a whole number" if kind is int else "a number"
            most = f" and below {below:g}" if below < float("inf") else ""
            problems.append(f"--{name} must be {what}, {least:g} or more{most}, got {given!r}.")
            return None
        return number

    numbers = {name: read(name, int, 1) for name in ("batch_size", "max_length", "gradient_accumulation_steps")}
    chunk = read("loss_chunk_tokens", int, 0)
    changes = {name: read(name, int, 1) for name in SIZES} | {"drop_rate": read("drop_rate", float, 0, 1)}
    changes |= {name: getattr(args, name) for name in VARIANTS}
    speed, tflops = read("tokens_per_second", float, 0), read("peak_tflops", float, 1e-9)
    for name, known in (("dtype", ("auto", *DTYPES)), ("optimizer", OPTIMIZERS)):
        if getattr(args, name) not in known:
            problems.append(f"--{name} must be one of {', '.join(known)}, got {getattr(args, name)!r}.")
    for name, known in VARIANTS.items():
        if changes[name] is not None and changes[name] not in known:
            problems.append(f"--{name} must be {' or '.join(known)}, got {changes[name]!r}.")
    if problems:
        raise ValueError("\n  ".join(["these arguments are wrong:", *problems]) if problems[1:] else problems[0])

    device, chip = read_device(args.device, tflops is not None)
    cfg = read_model(args.model, {name: value for name, value in changes.items() if value}, numbers["max_length"])
    cfg["drop_rate"] = changes["drop_rate"] or 0.0  # as train.py has it for fresh weights
    dtype = args.dtype if args.dtype != "auto" else dtype_of(device, chip)
    name, attention = read_attention(args.attn_implementation, device, cfg, dtype)
    step = TrainingStep(
        cfg, numbers["batch_size"], numbers["max_length"] or cfg["context_length"], dtype, name,
        "cpu" if device == "cpu" else "cuda", args.activation_checkpointing, chunk,
        numbers["gradient_accumulation_steps"], args.optimizer,
    )  # fmt: skip
    if tflops is not None:
        peak = mfu.Peak(tflops * 1e12, f"{chip or device}, {dtype}", "--peak_tflops")
    else:
        peak = mfu.peak_flops(chip or device, dtype)
    return step, attention, peak, speed


def read_device(name: str, peak_is_given: bool) -> tuple[str, str | None]:
    """(cpu, cuda or mps; the chip's name, where one is named).

    Raises:
        ValueError: no device, and no chip whose peak is known, unless the peak is given.
    """
    kind = name.partition(":")[0].lower()
    if kind in HERE:
        return (check_device(name) if not peak_is_given or kind == "auto" else kind), None
    if not peak_is_given and best_dtype(name) is None:
        mfu.peak_flops(name, "fp32")  # says which chips are known
    return "cuda", name


def best_dtype(chip: str) -> str | None:
    """The short dtype that a chip of the table has a peak in."""
    return next((dtype for dtype in ("bf16", "fp16") if mfu.known_peak(chip, dtype)), None)


def dtype_of(device: str, chip: str | None) -> str:
    """What --dtype auto means there: as in training, and of what is not here the best that is known."""
    if chip is not None:
        return best_dtype(chip) or "fp32"
    if device.startswith("cuda") and not torch.cuda.is_available():
        return "bf16"
    return resolve_dtype("auto", device)


def read_model(model: str, changes: dict, max_length: int | None) -> dict:
    """The complete cfg, with as many positions as train.py would give it."""
    if Path(model).is_dir():
        if changes:
            raise ValueError(
                f"--model {model} is a folder with weights: {', '.join(changes)} are theirs, leave them out."
            )
        return dict(GPTModel.from_pretrained(model).cfg)
    return from_preset(model, **changes, **({"context_length": max_length} if max_length else {}))


def read_attention(name: str, device: str, cfg: dict, dtype: str) -> tuple[str, str]:
    """The implementation that would serve training, and a word on why it is another than was asked for.

    On a CPU, what would really be taken; of a GPU, which may not be here, the one that is named, and sdpa for auto.
    """
    asked = canonical_name(name)
    if reads_pages(asked):
        reason = reasons_against(asked, AttentionRequest(needs_grad=True))[0]
        raise ValueError(f"--attn_implementation {name}: {reason.message}. {reason.remedy}.")
    if device != "cpu":
        return ("sdpa", "sdpa (what auto takes without flash-attn)") if asked == AUTO else (asked, asked)
    request = AttentionRequest(
        dtype=TORCH_DTYPES[dtype], dropout=cfg["drop_rate"], needs_grad=True, head_dim=cfg["emb_dim"] // cfg["n_heads"]
    )
    choice = decide(AttentionSettings(attn_implementation=asked), request)
    why = f" ({choice.explain()})" if asked not in (AUTO, choice.chosen) else ""
    return choice.chosen, choice.chosen + why


def estimate(step: TrainingStep, peak: mfu.Peak, speed: float | None) -> dict:
    """Every number, JSON-ready."""
    cfg, sizes = step.cfg, (step.batch, step.tokens)
    worst = training_peak(step)
    times = step.gradient_accumulation_steps
    whole, causal = (estimates.training_flops(cfg, *sizes, causal=causal) for causal in (False, True))
    embeddings = estimates.embedding_parameters(cfg)
    savers = {
        "activation checkpointing": replace(step, activation_checkpointing=True),
        "the loss over 512 tokens at a time": replace(step, loss_chunk_tokens=512),
        "both of them": replace(step, activation_checkpointing=True, loss_chunk_tokens=512),
    }
    return {
        "step": asdict(step),
        "parameters": {
            "total": estimates.count_parameters(cfg),
            "without_position_embeddings": estimates.count_parameters(cfg) - embeddings["position"],
            "token_embeddings": embeddings["token"],
            "position_embeddings": embeddings["position"],
        },
        "tokens_per_step": times * step.rows,
        "flops_per_token": {name: flops / step.rows for name, flops in whole.items()},
        "flops_per_token_causal": {name: flops / step.rows for name, flops in causal.items()},
        "flops_per_step": {name: times * flops for name, flops in whole.items()},
        "flops_per_step_causal": {name: times * flops for name, flops in causal.items()},
        "training_peak": {"bytes": worst.bytes, "moment": worst.name, "parts": worst.parts},
        "moments": {moment.name: moment.bytes for moment in moments(step)},
        "block_activations": {name: term._asdict() for name, term in block_activations(step).items()},
        "peak_with": {name: training_peak(other).bytes for name, other in savers.items()},
        "forward_peak": estimates.forward_peak(cfg, *sizes, short=step.size < 4, attention=step.attention),
        "kv_cache": estimates.memory_bytes(cfg, *sizes)["kv_cache"],
        "peak": asdict(peak),
        "flops_per_token_of_mfu": mfu.flops_per_token(cfg, step.tokens),
        "mfu": None if speed is None else mfu.mfu(cfg, step.tokens, speed, peak),
        "tokens_per_second": speed,
        "tokens_per_second_at": {
            str(part): mfu.tokens_per_second_at(cfg, step.tokens, part, peak) for part in PARTS_OF_PEAK
        },
    }


def page(model: str, step: TrainingStep, attention: str, peak: mfu.Peak, facts: dict) -> str:
    """All numbers as text: what, how much in which unit, by which formula. Letters side by side are multiplied."""
    cfg, forward, (C, F, K) = step.cfg, facts["forward_peak"], estimates.widths(step.cfg)
    lines = [
        f"{model}: {step.batch} sequences of {step.tokens} tokens, {step.dtype}, attention by {attention}, "
        f"dropout {cfg['drop_rate']}",
        f"V = {cfg['vocab_size']} words, C = {C} wide, L = {cfg['n_layers']} blocks, H = {cfg['n_heads']} heads, "
        f"F = {F} in the feed-forward,",
        f"K = {K} of keys, P = {cfg['context_length']} positions, B = {step.batch}, T = {step.tokens}, "
        f"s = {step.size} bytes of a number that matrix products read",
    ]
    if other := [f"{name} {cfg[name]}" for name in VARIANTS if cfg[name] != KEYS[name].default]:
        lines.append(f"not as in GPT-2: {', '.join(other)}")
    sections = {
        "Parameters": parameter_rows(cfg, facts["parameters"]),
        "FLOPs: matrix products only, 2 for a multiply-add": flops_rows(step, facts),
        f"Training: live tensor bytes at the worst moment ({facts['training_peak']['moment']})": peak_rows(facts),
        "What one block keeps for its backward pass": [
            (what, size(term["bytes"]), term["formula"]) for what, term in facts["block_activations"].items()
        ],
        "Without training": [
            ("a forward pass", size(forward["bytes"]), f"weights, and at the worst moment {forward['moment']}"),
            ("KV cache", size(facts["kv_cache"]), "2 x 4 L B T K: keys and values of as many tokens, in fp32"),
        ],
        "Speed": speed_rows(facts),
    }  # fmt: skip
    for title, rows in sections.items():
        lines += ["", title, *(f"  {what:44} {number:>15}   {formula}".rstrip() for what, number, formula in rows)]
    return "\n".join([*lines, "", *wrap(mfu.explain(cfg, step.tokens, peak))])


def parameter_rows(cfg: dict, counted: dict) -> list[Row]:
    rope, swiglu, norm = cfg["positions"] == "rope", cfg["mlp"] == "swiglu", 1 if cfg["norm"] == "rmsnorm" else 2
    block = f"L ({2 * norm} C + C (C + 2 K) + C C + {3 if swiglu else 2} C F + biases)"
    head = "" if cfg["tie_weights"] else " + V C (the head)"
    last = "2 C" if norm == 2 else "C"
    return [
        ("all", f"{counted['total']:,}", f"{'V C' if rope else '(V + P) C'} + {block} + {last}{head}"),
        ("without position embeddings", f"{counted['without_position_embeddings']:,}", "all" if rope else "all - P C"),
        ("token embeddings", f"{counted['token_embeddings']:,}", "V C" + "; the head is the same" * cfg["tie_weights"]),
        ("position embeddings", f"{counted['position_embeddings']:,}", "none with rope" if rope else "P C"),
    ]


def flops_rows(step: TrainingStep, facts: dict) -> list[Row]:
    whole, causal = facts["flops_per_token"], facts["flops_per_token_causal"]
    passes = f", {step.gradient_accumulation_steps} passes" * (step.gradient_accumulation_steps > 1)
    tokens = f"x {facts['tokens_per_step']:,} tokens{passes}"
    inner = "3 C F" if step.cfg["mlp"] == "swiglu" else "2 C F"
    return [
        ("a token, forward", si(whole["forward"]), f"2 (L (C (C + 2 K) + C C + {inner} + 2 T C) + V C)"),
        ("a token, backward", si(whole["backward"]), "2 x forward"),
        ("a token, training", si(whole["training"]), "3 x forward; attention over the whole table, as in eager"),
        ("a token, training, causal", si(causal["training"]), "the same with half of the table: T C instead of 2 T C"),
        ("a step", si(facts["flops_per_step"]["training"]), tokens),
        ("a step, causal", si(facts["flops_per_step_causal"]["training"]), tokens),
    ]


def peak_rows(facts: dict) -> list[Row]:
    peak = facts["training_peak"]
    rows = [("peak", size(peak["bytes"]), "the sum of these:")]
    rows += [(f"  {part}", size(number), PARTS[part]) for part, number in peak["parts"].items()]
    for moment, number in sorted(facts["moments"].items(), key=lambda item: -item[1])[1:4]:
        rows.append((f"next: {moment}", size(number), ""))
    return rows + [(f"with {what}", size(number), "") for what, number in facts["peak_with"].items()]


def speed_rows(facts: dict) -> list[Row]:
    rows = [] if facts["mfu"] is None else [
        (f"MFU at {facts['tokens_per_second']:,.0f} tokens/s", f"{facts['mfu']:.1%}", "the formula stands below")
    ]  # fmt: skip
    for part, speed in facts["tokens_per_second_at"].items():
        rows.append((f"tokens/s at an MFU of {float(part):.0%}", f"{speed:,.0f}", "MFU x peak / FLOPs a token"))
    return rows


def wrap(text: str) -> list[str]:
    return textwrap.wrap(text, 118, break_long_words=False, break_on_hyphens=False)


def size(number: float) -> str:
    """Bytes for a person."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:,.0f} B" if unit == "B" else f"{number:,.1f} {unit}"
        number /= 1024
    return f"{number:,.2f} GiB"


def si(number: float) -> str:
    """FLOPs for a person, with four digits: 855.1 MFLOP."""
    for letter in ("", "k", "M", "G", "T"):
        if number < 1000:
            return f"{number:.4g} {letter}FLOP"
        number /= 1000
    return f"{number:,.4g} PFLOP"
