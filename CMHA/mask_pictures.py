"""Pictures of an AttentionMask, as text and as a figure: what each query may see, and which rule hides the rest."""

from collections.abc import Sequence
from io import BytesIO

import torch
from torch import Tensor

SEEN, SOME, HIDDEN = "■", "▒", "·"
# rule -> (what hides the key, colour); where several rules hide a key, the first is shown.
RULES = {
    "padding": ("padding", "#dd6b20"),
    "causal": ("later than the query (causal)", "#cbd5e0"),
    "documents": ("another document", "#9f7aea"),
    "window": ("too far away (window)", "#68d391"),
}
SEEN_COLOUR = "#2b6cb0"


def text(mask, sequence: int = 0, width: int = 32) -> str:
    """The table as lines of characters: ■ seen, · hidden. A longer one is shown in tiles, ▒ where a tile has both.

    Args:
        mask: an AttentionMask. sequence: which one of the batch.
        width: the most characters in a line; each stands for one key, or for one tile of them.
    """
    table = one_sequence(mask, mask.dense(), sequence)
    side = max(1, -(-max(table.shape) // width))  # keys and queries in a tile
    scale = "one row for each query" if side == 1 else f"in tiles of {side} x {side}; {SOME} is partly seen"
    lines = [f"{mask.kind}: {mask.query_len} queries, {mask.key_len} keys ({scale})"]
    for rows in table.split(side):
        tiles = rows.split(side, dim=1)
        lines.append(" ".join(SEEN if tile.all() else SOME if tile.any() else HIDDEN for tile in tiles))
    return "\n".join(lines)


def figure(mask, sequence: int = 0, words: Sequence[str] | None = None):
    """The table as a matplotlib figure: keys seen in blue, hidden ones in the colour of the rule that hides them.

    Args:
        mask: an AttentionMask. sequence: which one of the batch.
        words: the keys' tokens as text, for the axes; the queries are the last of them.
    Returns:
        matplotlib.figure.Figure: a notebook shows it, `.savefig("mask.png")` keeps it.
    """
    from matplotlib.colors import BoundaryNorm, ListedColormap, to_rgb
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    reason = hiding_rule(mask, sequence)  # (query_len, key_len): 0 seen, else 1 + the number of the rule
    colours = [SEEN_COLOUR, *(colour for _, colour in RULES.values())]
    size = min(9.0, max(3.4, 0.24 * mask.key_len)), min(9.0, max(2.6, 0.24 * mask.query_len + 1.4))
    drawing = Figure(figsize=size, layout="constrained")
    axes = drawing.add_subplot()
    norm = BoundaryNorm(range(len(colours) + 1), len(colours))
    axes.imshow(
        reason.numpy(), cmap=ListedColormap([to_rgb(colour) for colour in colours]), norm=norm, interpolation="nearest"
    )
    if words is not None and len(words) != mask.key_len:
        raise ValueError(f"words are the keys' tokens, one for each of {mask.key_len} keys, got {len(words)}.")
    if words is not None:
        axes.set_xticks(range(mask.key_len), words, rotation=90, fontsize=8)
        axes.set_yticks(range(mask.query_len), list(words)[-mask.query_len :], fontsize=8)
    else:
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
    if max(reason.shape) <= 40:  # white lines between the cells
        axes.set_xticks([x - 0.5 for x in range(1, mask.key_len)], minor=True)
        axes.set_yticks([y - 0.5 for y in range(1, mask.query_len)], minor=True)
        axes.grid(which="minor", color="white", linewidth=0.8)
        axes.tick_params(which="minor", length=0)
    axes.set(xlabel="key", ylabel="query", title=mask.kind)
    present = reason.unique().tolist()
    labels = ["may be seen", *(f"hidden: {what}" for what, _ in RULES.values())]
    patches = [Patch(color=colours[number], label=labels[number]) for number in present]
    drawing.legend(handles=patches, loc="outside lower center", frameon=False, fontsize=8)
    drawing._repr_png_ = lambda: as_png(drawing)  # a notebook that has not set matplotlib up shows it all the same
    return drawing


def as_png(drawing) -> bytes:
    """The figure as the bytes of a PNG file."""
    file = BytesIO()
    drawing.savefig(file, format="png", dpi=100)
    return file.getvalue()


def hiding_rule(mask, sequence: int = 0) -> Tensor:
    """(query_len, key_len): 0 where the key is seen, else the place in RULES, from 1, of the first rule against it."""
    reason = torch.zeros(mask.query_len, mask.key_len, dtype=torch.int64)
    rules = mask.rules()
    for number, name in reversed(list(enumerate(RULES, start=1))):
        if name in rules:
            reason[~one_sequence(rules[name], rules[name].dense(), sequence)] = number
    return reason


def one_sequence(mask, table: Tensor, sequence: int) -> Tensor:
    """(query_len, key_len) of one sequence; a mask without padding and documents is the same for all."""
    shared = mask.padding_mask is None and mask.documents is None
    if not shared and not 0 <= sequence < table.shape[0]:
        raise ValueError(f"there are {table.shape[0]} sequences, got sequence={sequence}: count from 0.")
    return table[0 if shared else sequence, 0].cpu()
