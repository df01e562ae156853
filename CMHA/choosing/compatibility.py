"""The compatibility table of the documentation, made by asking each implementation's own check.

Reasons about this machine (a package that is not installed, no compiler) are left out, so the table is the same
everywhere; `python -m orchestrator doctor` has them. `python -m CMHA.choosing.compatibility` prints it.
"""

from dataclasses import replace

import torch

from CMHA.choosing.choose import reads_pages, reasons_against
from CMHA.choosing.names import AUTO, known_names
from CMHA.request import MACHINE_CODES, AttentionRequest

# A plain causal forward pass, in the dtype that each device is used with.
DEVICES = {
    "CPU": AttentionRequest(device="cpu"),
    "CUDA, Ampere": AttentionRequest(device="cuda", dtype=torch.bfloat16, capability=(8, 0)),
    "CUDA, Hopper": AttentionRequest(device="cuda", dtype=torch.bfloat16, capability=(9, 0)),
    "MPS": AttentionRequest(device="mps"),
}
# These columns are what the checks say: nobody has run them yet. To take one out, run `python -m orchestrator parity
# --device cuda` there, and put its parity.json into benchmarks/results/.
NOT_RUN_ON_HARDWARE = ("CUDA, Ampere", "CUDA, Hopper", "MPS")
# What is asked for on top of it.
FEATURES = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "gradients": {"needs_grad": True},
    "dropout": {"dropout": 0.1},
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


def compatibility() -> dict[str, dict[str, str]]:
    """{name: {device or feature: "yes", or the codes against it}}.

    A feature is asked for on each device that the implementation serves at all; where the answers differ, the devices
    without it are named behind the yes. What reads the pages of a paged cache is asked about calls that have one.
    """
    table = {}
    for name in known_names():
        if name == AUTO:
            continue
        calls = {device: replace(request, paged=reads_pages(name)) for device, request in DEVICES.items()}
        against = {device: codes_against(name, request) for device, request in calls.items()}
        homes = [device for device, codes in against.items() if not codes]
        row = {device: ", ".join(codes) or "yes" for device, codes in against.items()}
        for feature, wish in FEATURES.items():
            answers = {home: ", ".join(codes_against(name, replace(calls[home], **wish))) for home in homes}
            lacking = {home: codes for home, codes in answers.items() if codes}
            if not homes:
                row[feature] = row["CPU"]
            elif len(lacking) == len(homes):
                row[feature] = ", ".join(dict.fromkeys(lacking.values()))
            else:
                row[feature] = "; ".join(["yes", *(f"{home}: {codes}" for home, codes in lacking.items())])
        table[name] = row
    return table


def markdown_table() -> str:
    """The table that stands in docs/ATTENTION_BACKENDS.md: yes, or the code of what is against it."""
    columns = [*DEVICES, *FEATURES]
    titles = [column + " (not run on hardware)" * (column in NOT_RUN_ON_HARDWARE) for column in columns]
    lines = ["| implementation | " + " | ".join(titles) + " |", "| --- " * (len(columns) + 1) + "|"]
    for name, row in compatibility().items():
        lines.append(f"| `{name}` | " + " | ".join(row[column] for column in columns) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown_table())
