"""The compatibility table of the documentation, made by asking each implementation's own check.

Reasons about this machine (a package that is not installed, no compiler) are left out, so the table is the same
everywhere; `python -m orchestrator doctor` has them. `python -m CMHA.choosing.compatibility` prints it.
"""

from dataclasses import replace

import torch

from CMHA.choosing.choose import reasons_against
from CMHA.choosing.names import AUTO, known_names
from CMHA.request import MACHINE_CODES, AttentionRequest

# A plain causal forward pass, in the dtype that each device is used with.
DEVICES = {
    "CPU": AttentionRequest(device="cpu"),
    "CUDA, Ampere": AttentionRequest(device="cuda", dtype=torch.bfloat16, capability=(8, 0)),
    "CUDA, Hopper": AttentionRequest(device="cuda", dtype=torch.bfloat16, capability=(9, 0)),
    "MPS": AttentionRequest(device="mps"),
}
# What is asked for on top of it.
FEATURES = {
    "float32": {"dtype": torch.float32},
    "float16": {"dtype": torch.float16},
    "gradients": {"needs_grad": True},
    "dropout": {"needs_grad": True, "dropout": 0.1},
    "padding": {"mask_kind": "causal+padding"},
    "documents": {"mask_kind": "causal+documents"},
    "window": {"mask_kind": "causal+window"},
    "KV cache": {"query_len": 1},
    "grouped heads": {"num_kv_heads": 4},
    "weights": {"needs_weights": True},
}


def codes_against(name: str, request: AttentionRequest) -> list[str]:
    """The codes of the reasons that are not about this machine."""
    return [reason.code for reason in reasons_against(name, request) if reason.code not in MACHINE_CODES]


def compatibility() -> dict[str, dict[str, list[str]]]:
    """{name: {device or feature: codes against it, empty = yes}}.

    A feature is asked for on each device that the implementation serves at all; it has it if it has it on one of them.
    """
    table = {}
    for name in known_names():
        if name == AUTO:
            continue
        row = {column: codes_against(name, request) for column, request in DEVICES.items()}
        homes = [DEVICES[column] for column, codes in row.items() if not codes]
        for feature, wish in FEATURES.items():
            answers = [codes_against(name, replace(home, **wish)) for home in homes]
            row[feature] = min(answers, key=len) if answers else codes_against(name, DEVICES["CUDA, Hopper"])
        table[name] = row
    return table


def markdown_table() -> str:
    """The table that stands in docs/ATTENTION_BACKENDS.md: yes, or the code of what is against it."""
    columns = [*DEVICES, *FEATURES]
    lines = ["| implementation | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 1) + "|"]
    for name, row in compatibility().items():
        cells = ["yes" if not row[column] else ", ".join(row[column]) for column in columns]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown_table())
