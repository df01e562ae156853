"""Is this still the run that the checkpoint is of? What was saved and what is asked for now, side by side.

Some differences make it another run: another architecture, other data. Some are a person's decision on the way: more
steps, a lower learning rate. The first are refused and the second are said, every one of them.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from CMHA.choosing import AttentionSettings
from GPT2Model.config import KEYS

# cfg keys that say how attention is computed and how weights began; all others are the architecture.
NOT_ARCHITECTURE = {field.name for field in fields(AttentionSettings)} | {"use_flash", "init_std"}
# Settings and options that decide which numbers come in which order.
ANOTHER_RUN = {
    "seed", "batch_size", "gradient_accumulation_steps", "optimizer", "pack_documents", "max_length", "dataset",
    "tokenizer",
}  # fmt: skip
# Options about the command itself.
OF_THE_COMMAND = {"resume", "config", "out"}
FROM_HERE_ON = "it counts from here on, and the result is not that of one run with it"
LAST_BITS = "the numbers may differ in their last digits from those of a run that was not stopped"
NOTES = {
    "max_steps": "the learning rate follows the new schedule from here on, and jumps if it was falling",
    **dict.fromkeys(
        ("learning_rate", "warmup_steps", "min_lr_ratio", "schedule", "decay_part", "weight_decay", "betas", "clip"),
        FROM_HERE_ON,
    ),
    **dict.fromkeys(("dtype", "device", "compile", "attn_implementation", "attention", "use_flash"), LAST_BITS),
    **dict.fromkeys(("activation_checkpointing", "loss_chunk_tokens"), LAST_BITS),
}


class Differences(NamedTuple):
    """Phrases, one for each difference.

    Attributes:
        refused: those that make it another run. allowed: those that it can go on with.
    """

    refused: list[str]
    allowed: list[str]


def differences(saved: Mapping, asked: Mapping) -> Differences:
    """Every difference between the facts of a checkpoint and those of the run that is to go on with it.

    Args:
        saved, asked: JSON-ready facts: "cfg", "settings" and "options" hold dicts; what is beside them (the tokenizer,
            "data") is compared whole, and must be equal. What only one of the two knows cannot be compared.
    """
    saved, asked = (json.loads(json.dumps(facts)) for facts in (saved, asked))  # a tuple and its list are the same
    found = Differences([], [])
    same_data = "data" in saved and saved["data"] == asked.get("data")
    for group in [group for group in saved if group in asked]:
        before, now = saved[group], asked[group]
        if group == "cfg":
            refused, allowed = cfg_differences(before, now)
            found.refused.extend(refused)
            found.allowed.extend(allowed)
        elif group == "settings":
            add_settings(found, before, now)
        elif group == "options":
            told = {*KEYS, *saved, *saved.get("cfg", {}), *saved.get("settings", {}), *OF_THE_COMMAND, "model"}
            add_settings(
                found, *({k: v for k, v in part.items() if k not in told} for part in (before, now)), same_data
            )
        elif before != now and group != "tokenizer_fingerprint":  # the tokenizer's own facts have it
            phrase = phrase_of_facts(group, before, now)
            add(found, phrase, refused=group not in NOTES, note=NOTES.get(group))
    return found


def cfg_differences(before: Mapping, now: Mapping) -> Differences:
    """Of two cfg dicts; a key that one of them lacks, since it was made before there was one, is the default."""
    before, now = ({name: part.get(name, key.default) for name, key in KEYS.items()} | part for part in (before, now))
    found = Differences([], [])
    for name in changed(before, now):
        phrase = phrase_of(f"cfg: {name}", before.get(name), now.get(name))
        add(found, phrase, refused=name not in NOT_ARCHITECTURE, note=NOTES.get(name))
    return found


def add_settings(found: Differences, before: Mapping, now: Mapping, same_data: bool = False) -> None:
    for name in changed(before, now):
        phrase = phrase_of(name, before.get(name), now.get(name))
        if name == "dataset" and same_data:
            add(found, phrase, refused=False, note="the same content")
        else:
            add(found, phrase, refused=name in ANOTHER_RUN, note=NOTES.get(name))


def changed(before: Mapping, now: Mapping) -> list[str]:
    """The names whose values differ, or that only one side has."""
    missing = object()
    return [name for name in dict.fromkeys([*before, *now]) if before.get(name, missing) != now.get(name, missing)]


def phrase_of(name: str, before, now) -> str:
    return f"{name}: {short(before)} was saved, {short(now)} is asked for"


def add(found: Differences, phrase: str, *, refused: bool, note: str | None) -> None:
    if refused:
        found.refused.append(phrase)
    else:
        found.allowed.append(phrase + (f" ({note})" if note else ""))


def other_run(place: Path, problems: list[str]) -> str:
    return (
        f"{place} is of another run:\n"
        + "\n".join(f"  - {problem}" for problem in problems)
        + f"\nGo on with what was saved; or begin a new run from its weights: --model {place} --out ANOTHER_FOLDER."
    )


def phrase_of_facts(name: str, before, now) -> str:
    """What a person can compare: of a tokenizer its name and size, of the files of a data set how many are the same."""
    if isinstance(before, list) and isinstance(now, list):
        same = len(set(before) & set(now))
        return f"{name}: {same} of {len(before)} files that were saved are among the {len(now)} asked for (by SHA-256)"
    texts = [value.get("name", "") if isinstance(value, dict) else "" for value in (before, now)]
    if all(texts):
        kept = ("name", "vocab_size", "fingerprint")
        texts = [" ".join(str(value[key]) for key in kept if key in value) for value in (before, now)]
        if texts[0] != texts[1]:
            return phrase_of(name, *texts)
    return phrase_of(name, before, now)


def short(value, most: int = 80) -> str:
    """A value in a line: a vocabulary may be long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."
