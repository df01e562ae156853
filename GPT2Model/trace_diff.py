"""Two traces side by side: the first tensor that differs by more than rounding, and by how much."""

from dataclasses import dataclass

import torch

from GPT2Model.trace_values import Trace, Value

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-2}
SAME, ROUNDED, PARTED, SHAPE, ONLY_A, ONLY_B = (
    "same bits",
    "rounding",
    "parted",
    "other shape",
    "only in a",
    "only in b",
)


@dataclass(frozen=True)
class Row:
    """One name of two traces. amount: the largest difference; relative: to a's largest value; where: its index."""

    name: str
    verdict: str
    amount: float = float("nan")
    relative: float = float("nan")
    where: tuple[int, ...] = ()
    note: str = ""

    @property
    def figure(self) -> str:
        """How far apart, in words; of other shapes which, and nothing of what only one trace has."""
        if self.verdict == SHAPE:
            return self.note
        if self.amount != self.amount:
            return ""
        if self.relative == float("inf"):
            what = "a number against NaN or inf" if self.amount == float("inf") else "and a is 0 throughout"
            return f"{self.amount:9.2e} ({what})"
        return f"{self.amount:9.2e} ({self.relative:.1e} of the largest value)"


@dataclass(frozen=True)
class Difference:
    """What `diff` found. rows: every tensor, in the order of computation; first: the first that parted, or None."""

    rows: list[Row]

    @property
    def first(self) -> str | None:
        return next((row.name for row in self.rows if row.verdict in (PARTED, SHAPE)), None)

    @property
    def amount(self) -> float:
        """The largest difference at `first`; infinite where the shapes differ; 0 where nothing parted."""
        return next((row.amount for row in self.rows if row.name == self.first), 0.0)

    def __str__(self) -> str:
        verdicts = [row.verdict for row in self.rows]
        counts = {verdict: verdicts.count(verdict) for verdict in (SAME, ROUNDED, PARTED)}
        counts |= {verdict: verdicts.count(verdict) for verdict in (SHAPE, ONLY_A, ONLY_B) if verdict in verdicts}
        lines = []
        for row in self.rows:
            if row.name == self.first:
                lines.append(f"They part at {row.name}: {row.note}")
        if not lines:
            lines.append("They do not part: nothing differs by more than rounding.")
        lines.append(
            ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + f"; {len(self.rows)} in all"
        )
        width = max(len(row.name) for row in self.rows)
        for row in self.rows:
            lines.append(
                f"  {row.name:{width}}  {row.verdict:11}  {row.figure}{' <- first' * (row.name == self.first)}"
            )
        return "\n".join(lines)

    __repr__ = __str__


def compare(one: Trace, other: Trace, tolerance: float | None = None) -> Difference:
    """A row for each name of the first trace, then those that only the second has."""
    rows = [
        compare_values(value, other.values[name], tolerance) if name in other else Row(name, ONLY_A)
        for name, value in one.values.items()
    ]
    return Difference([*rows, *(Row(name, ONLY_B) for name in other.values if name not in one)])


def compare_values(a: Value, b: Value, tolerance: float | None) -> Row:
    if a.tensor.shape != b.tensor.shape:
        note = f"shapes {tuple(a.tensor.shape)} and {tuple(b.tensor.shape)}"
        return Row(a.name, SHAPE, float("inf"), float("inf"), note=note)
    if torch.equal(a.tensor, b.tensor):
        return Row(a.name, SAME, 0.0, 0.0)
    limit = max(ROUNDING[a.tensor.dtype], ROUNDING[b.tensor.dtype]) if tolerance is None else tolerance
    left, right = a.tensor.double(), b.tensor.double().to(a.tensor.device)
    apart = (left - right).abs()
    apart = apart.masked_fill(left == right, 0.0)  # two -inf are equal, and their difference is NaN
    apart = apart.masked_fill(apart.isnan(), float("inf"))  # a number against NaN
    amount, at = apart.flatten().max(dim=0)
    where = tuple(int(i) for i in torch.unravel_index(at, apart.shape))
    visible = left[(left > torch.finfo(a.tensor.dtype).min) & left.isfinite()]
    largest = visible.abs().max().item() if len(visible) else 0.0
    relative = amount.item() / largest if largest else float("inf")
    place = ", ".join(f"{axis} {i}" for axis, i in zip(a.axes, where, strict=True))
    note = f"{left[where].item():.6g} against {right[where].item():.6g} at {place}"
    return Row(a.name, ROUNDED if relative <= limit else PARTED, amount.item(), relative, where, note)
