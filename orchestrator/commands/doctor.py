"""What does this machine have, and what does each name of attention give on it? Nothing is computed or changed.

    python -m orchestrator doctor                   this machine, and its best device
    python -m orchestrator doctor --device cuda     what the names would give on a CUDA device, here or not
    python -m orchestrator doctor --json            the same as data: for a bug report, or another program

It says where GPT-2's vocabulary and weights come from, what is installed and really imports, what each name would give
for training and for generation and why, whether flash-attn could be compiled, and the line that installs what is
missing. No network is asked. The exit code is 0 whatever it finds.
"""

import argparse
import contextlib
import json
import os
import sys
import textwrap
from collections.abc import Iterable

import torch

from CMHA.choosing.names import AUTO
from CMHA.request import MACHINE_CODES
from orchestrator.evaluation.build_tools import gib
from orchestrator.evaluation.doctor import PURPOSES, TOKENS, examine
from orchestrator.evaluation.tokenizer_and_weights import wrong_files
from orchestrator.report import plain

HELP = "what this machine has, what each name of attention gives on it, what is missing"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HOW_TRITON_RUNS = {
    "compiler": "; compiles here, for a GPU",
    "interpreter": "; interprets here, since TRITON_INTERPRET=1 is set: on a CPU, for tests",
}
WIDTH, INDENT = 100, 22  # columns of the page; columns of what stands before the text of a row
COLUMNS = {  # of the table; `prompt` stands below it, where it differs
    "training": f"training with dropout {PURPOSES['training']['dropout']}",
    "training_without_dropout": "training without dropout",
    "generation": "generation",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda", "mps"),
        default="auto",
        help="the device to ask about, here or not (default: the best one here)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default=None, help="default: bfloat16 on CUDA, float32 elsewhere")
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, on stdout")


def run(args: argparse.Namespace) -> int:
    with contextlib.redirect_stdout(sys.stderr):  # a package may print while it is imported
        facts = examine(args.device, DTYPES.get(args.dtype))
    print(json.dumps(plain(facts), indent=2) if args.json else page(facts))
    return 0


def page(facts: dict) -> str:
    """All sections as text."""
    sections = [
        ("Machine", machine_rows(facts)),
        ("Tokenizer and weights", text_rows(facts["tokenizer"], facts["weights"])),
        ("Packages for attention", package_rows(facts["packages"])),
        attention_section(facts["attention"]),
        ("Why", why_rows(facts["attention"]["names"])),
        build_section(facts["build"]),
        ("What is missing, and the line that installs it", missing_rows(facts)),
    ]
    return "\n\n".join("\n".join([title, *lines]) for title, lines in sections)


def wrap(text: str, width: int = WIDTH, **indents: str) -> list[str]:
    """Lines of at most `width` columns; a path or a name with hyphens stays whole."""
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False, **indents)


def row(name: str, text: str, more: int = 0) -> list[str]:
    """A name and its text, wrapped beside it; `more` columns of the text are a column of their own."""
    lines = wrap(text, WIDTH - INDENT, subsequent_indent=" " * more)
    return [f"{f'  {name}' if i == 0 else '':{INDENT}}{line}" for i, line in enumerate(lines or [""])]


def machine_rows(facts: dict) -> list[str]:
    machine, about = facts["machine"], facts["torch"]
    cuda, rocm, threads = about["built_for_cuda"], about["built_for_rocm"], about["threads"]
    built = f"for CUDA {cuda}" if cuda else f"for ROCm {rocm}" if rocm else "without CUDA"
    lines = row("system", f"{machine['system']}, {machine['architecture']}, Python {machine['python']}")
    lines += row("torch", f"{about['version']}, built {built}; {threads} CPU thread{'s' * (threads != 1)}")
    for device in facts["devices"]:
        lines += row(device["type"], describe_device(device))
    if not about["cuda_available"]:
        lines += row("cuda", "none that this torch can use")
    if not about["mps_available"]:
        lines += row("mps", "none (Apple's GPUs)")
    return lines + row("tpu", "torch_xla is " + ("installed" if about["torch_xla_installed"] else "not installed"))


def describe_device(device: dict) -> str:
    if "error" in device:
        return f"does not answer: {device['error']}"
    if device["type"] != "cpu":
        capability = device["capability"] and "compute capability {}.{}".format(*device["capability"])
        return ", ".join(filter(None, [device["name"], capability, gib(device["memory_bytes"])]))
    bf16 = device["bf16_instructions"]
    has_bf16 = "" if bf16 is None else f", bf16 instructions: {', '.join(bf16) or 'none (right, and slow)'}"
    memory = f"{gib(device['memory_bytes'])} of memory, {gib(device['memory_available_bytes'])} available"
    return f"{device['name']}, {device['cores']} cores, {device['capability']}{has_bf16}; {memory}"


def text_rows(vocabulary: dict, weights: dict) -> list[str]:
    """Where the vocabulary and the weights come from, and whether they are there."""
    folder, remedy, wrong = vocabulary["folder"], vocabulary["remedy"], ", ".join(wrong_files(vocabulary))
    if wrong:
        state = f"WRONG: {wrong} in {folder} is not as OpenAI published it. What to do: {remedy}"
    elif folder:
        state = f"from {vocabulary['source']}, checksums right, no network needed: {folder}"
    else:
        state = f"not here: it is downloaded at first use. Without a network: {remedy}"
    version, other = weights["huggingface_hub"], weights["transformers"]
    cached = ", ".join(weights["cached"]) or "none of them"
    hub = f'{version or "":16} needed only for names such as "gpt2"; on this machine already: {cached}'
    if version is None:
        hub = f'not installed, and needed only for names such as "gpt2". What to do: {weights["remedy"]}'
    elif weights["error"]:
        hub = f"{version}, but it does not import: {weights['error']}. What to do: {weights['remedy']}"
    compared = (
        f"{other or 'not installed':16} needed only to run our attention under its models (docs/WITH_TRANSFORMERS.md), "
        "and by the tests, which compare with it"
    )
    rows = [("vocabulary", state, 0), ("huggingface_hub", hub, 17 * (weights["remedy"] is None))]
    return [line for cells in [*rows, ("transformers", compared, 17)] for line in row(*cells)]


def package_rows(packages: dict[str, dict]) -> list[str]:
    lines = []
    for package in packages.values():
        state = package["version"] or "not installed"
        if package["error"]:
            lines += row(package["distribution"], f"{state}, but it does not import: {package['error']}")
        else:
            how = HOW_TRITON_RUNS.get(package.get("runs"), "")
            lines += row(package["distribution"], f"{state:16} {package['purpose']}{how}", more=17)
    return lines


def attention_section(attention: dict) -> tuple[str, list[str]]:
    names = attention["names"]
    width = max(map(len, names)) + 2
    rows = {"name": COLUMNS.values()} | {
        name: [served_by(answers[purpose]) for purpose in COLUMNS] for name, answers in names.items()
    }
    lines = []
    if not attention["here"]:
        lines.append(f"  There is no {attention['device']} device here: answered from the checks alone.")
    lines += [f"  {name:{width}}" + "".join(f"{cell:27}" for cell in cells).rstrip() for name, cells in rows.items()]
    others = [
        f"{name} {served_by(answers['prompt'])}"
        for name, answers in names.items()
        if answers["prompt"]["chosen"] != answers["generation"]["chosen"]
    ]
    notes = [f"Generation is one new token against a cache of {TOKENS:,}; reading the prompt is served alike"]
    notes.append(f", except: {', '.join(others)}. " if others else ". ")
    if any("(" in cell for cells in list(rows.values())[1:] for cell in cells):
        notes.append("In brackets: the kernel that torch's op picks; math is the plain formula, with a T x T table")
        forced = [names[AUTO][purpose]["torch_sdpa_kernel"] for purpose in PURPOSES][:2] == ["math", "flash"]
        notes.append(" (here dropout forces it)." if forced else ".")
    lines += wrap("".join(notes), initial_indent="  ", subsequent_indent="  ")
    title = f"What each name gives on {attention['device']} in {attention['dtype']}: GPT-2's 12 heads of 64"
    return f"{title}, {TOKENS:,} tokens", lines


def served_by(answer: dict) -> str:
    kernel = answer["torch_sdpa_kernel"]
    return f"{answer['chosen']} ({kernel})" if kernel not in (None, "unknown") else answer["chosen"]


def why_rows(names: dict[str, dict]) -> list[str]:
    """One row for each name that something else serves; what stands in the way of several purposes is said once."""
    lines, as_asked = [], []
    for name, answers in names.items():
        if name == AUTO:
            why = [f"{answers[p]['chosen']} is {answers[p]['why'].removeprefix('auto: ')}" for p in COLUMNS]
            texts = [f"{where(purposes)}{text}" for text, purposes in grouped(zip(COLUMNS, why, strict=True)).items()]
        else:
            texts = obstacles({purpose: answers[purpose]["rejected"].get(name, []) for purpose in COLUMNS})
        for i, text in enumerate(texts):
            lines += row("" if i else name, text, more=2)
        if not texts:
            as_asked.append(name)
    return [*lines, *wrap(f"As asked: {', '.join(as_asked)}.", initial_indent="  ", subsequent_indent="  ")]


def obstacles(rejected: dict[str, list[dict]]) -> list[str]:
    """{purpose: reasons} -> a line for each set of purposes that have the same ones, with the first remedy.

    Beside a reason that lies in the call, one that an installation could take away says nothing: it is left out.
    """
    reasons = [
        (purpose, reason)
        for purpose, against in rejected.items()
        for reason in [r for r in against if r["code"] not in MACHINE_CODES] or against
    ]
    remedies = {reason["message"]: reason["remedy"] for _, reason in reasons}
    purposes_of = grouped((purpose, reason["message"]) for purpose, reason in reasons)
    messages_of = grouped((message, purposes) for message, purposes in purposes_of.items())
    everywhere = tuple(rejected)
    if everywhere in messages_of:  # enough to know
        messages_of = {everywhere: messages_of[everywhere]}
    return [
        f"{where(purposes)}{'; '.join(messages)} (what to do: {remedies[messages[0]]})"
        for purposes, messages in messages_of.items()
    ]


def grouped(pairs: Iterable[tuple]) -> dict:
    """(a, b) pairs -> {b: (every a that came with it)}."""
    found: dict = {}
    for one, other in pairs:
        found[other] = (*found.get(other, ()), one)
    return found


def where(purposes: tuple[str, ...]) -> str:
    """What a reason is about: nothing to say where it holds for all."""
    if purposes == tuple(COLUMNS):
        return ""
    if purposes == ("training", "training_without_dropout"):
        return "training: "
    return " and ".join(COLUMNS[purpose] for purpose in purposes) + ": "


def build_section(build: dict[str, dict]) -> tuple[str, list[str]]:
    lines, needless = [], build["GPU"]["verdict"] == "missing"
    for name, finding in build.items():
        remedy = f". What to do: {finding['remedy']}" if finding["remedy"] and not needless else ""
        lines += row(name, f"{finding['verdict']:12}{finding['found']}{remedy}", more=12)
    title = "To compile flash-attn"
    return f"{title} (none of it is needed here: flash-attn runs on NVIDIA GPUs only)" if needless else title, lines


def missing_rows(facts: dict) -> list[str]:
    lines = []
    for item in facts["missing"]:
        lines += row(item["what"], item["why"])
        for step in item["do"]:
            lines += row("", f"- {step}", more=2)
    if not lines:
        lines.append("  Nothing.")
    if facts["build"]["GPU"]["verdict"] == "missing":
        triton = facts["packages"]["triton"]
        packages = [package["distribution"] for package in facts["packages"].values() if package is not triton]
        note = f"Without an NVIDIA GPU nothing would be gained by installing {', '.join(packages)}. "
        lines += wrap(note + about_triton(triton), initial_indent="  ", subsequent_indent="  ")
    return lines


def about_triton(package: dict) -> str:
    """What triton is good for where there is no GPU, and what it takes: only its interpreter runs there."""
    slow = "slowly, to try them in short cases"
    if package["runs"] == "interpreter":
        return f"triton's interpreter runs our kernels (flash_triton) here, since TRITON_INTERPRET=1 is set: {slow}."
    install = "" if package["version"] else f" {package['install']}, then"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return f"triton's interpreter would run our kernels (flash_triton) here, {slow}: see above."
    return (
        f"triton's interpreter runs our kernels (flash_triton) here, {slow}:{install} set TRITON_INTERPRET=1 before "
        "Python starts."
    )
