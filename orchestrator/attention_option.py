"""--attn_implementation, and the flag that it replaced: what a command line asks for."""

import sys

from CMHA.choosing import canonical_name


def requested_attention(args) -> str:
    """What `args.attn_implementation` asks for, or `args.use_flash_attention`, which means flash_attention_2.

    Raises:
        ValueError: both are given, and mean different things.
    """
    new = args.attn_implementation
    if not args.use_flash_attention:
        return new or "auto"
    if new is not None and canonical_name(new) != "flash_attention_2":
        raise ValueError(
            f"--use_flash_attention means --attn_implementation flash_attention_2, and --attn_implementation {new} is "
            "given too: leave out the first."
        )
    print(
        "warning: --use_flash_attention is deprecated and means --attn_implementation flash_attention_2: write that.",
        file=sys.stderr,
    )
    return "flash_attention_2"
