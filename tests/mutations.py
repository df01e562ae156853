"""Plant classic mistakes, one at a time, in a scratch copy of the project, and see a test fail for each.

    python tests/mutations.py            all of them; exit code 1 if a mistake passes unnoticed
    python tests/mutations.py scale      those whose name contains "scale"

A test that cannot fail is a defect: this is how it is found. Not part of `make test`, since it takes a
minute and shows nothing new while the tests stay as they are.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("CMHA", "TransformerBlock", "GPT2Model", "orchestrator", "tests", "pyproject.toml")
ATTENTION = ("tests/CMHA/test_cmha.py", "tests/CMHA/implementations/test_parity.py")
MASKS = ("tests/CMHA/test_masks.py", "tests/orchestrator/evaluation/test_grading.py")
CHOOSING = ("tests/CMHA/choosing",)
PACKAGES = ("tests/CMHA/implementations/test_flash_attention_packages.py",)
VARIANTS = (
    "tests/CMHA/test_rotary.py",
    "tests/CMHA/test_masks.py",
    "tests/TransformerBlock",
    "tests/GPT2Model/test_variants.py",
)
MODEL = ("tests/TransformerBlock", "tests/GPT2Model/test_gpt2.py", "tests/GPT2Model/test_against_hugging_face.py")


@dataclass(frozen=True)
class Mistake:
    """One line of one file, made wrong, and the tests that should see it."""

    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...] = ATTENTION


MISTAKES = [
    Mistake("scale forgotten", "CMHA/cmha.py", "scale = self.head_dim**-0.5", "scale = 1.0"),
    Mistake(
        "mask shifted: the next token is seen",
        "CMHA/masks.py",
        "rules.append((keys <= queries)[None, None])",
        "rules.append((keys <= queries + 1)[None, None])",
    ),
    Mistake(
        "mask shifted: the token itself is hidden",
        "CMHA/masks.py",
        "rules.append((keys <= queries)[None, None])",
        "rules.append((keys < queries)[None, None])",
    ),
    Mistake(
        "view without transpose",
        "CMHA/cmha.py",
        "x.view(*x.shape[:2], num_heads, self.head_dim).transpose(1, 2)",
        "x.reshape(x.shape[0], num_heads, x.shape[1], self.head_dim)",
    ),
    Mistake("exact GELU", "TransformerBlock/layers.py", 'F.gelu(x, approximate="tanh")', "F.gelu(x)", MODEL),
    Mistake(
        "unbiased variance",
        "TransformerBlock/layers.py",
        "F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.EPS)",
        "(x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + self.EPS).sqrt() * self.weight + self.bias",
        MODEL,
    ),
    Mistake(
        "head untied",
        "GPT2Model/gpt2.py",
        "self.head.weight = self.token_embedding.weight",
        "self.head.weight = nn.Parameter(self.token_embedding.weight.detach().clone())",
        MODEL,
    ),
    Mistake("dropout left on in eval", "CMHA/cmha.py", "self.dropout if self.training else 0.0\n", "self.dropout\n"),
    Mistake(
        "one head's values swapped",
        "CMHA/cmha.py",
        "        if cache is not None:\n            keys, values = cache",
        "        values = values[:, [1, 0, *range(2, values.shape[1])]] if values.shape[1] > 1 else values\n"
        "        if cache is not None:\n            keys, values = cache",
    ),
    Mistake(
        "attention's residual dropped",
        "TransformerBlock/transformer_block.py",
        'tap("after_attention", x + self.dropout(self.attention(',
        'tap("after_attention", self.dropout(self.attention(',
        MODEL,
    ),
    Mistake(
        "feed-forward's residual dropped",
        "TransformerBlock/transformer_block.py",
        "x = x + self.dropout(self.feed_forward(",
        "x = self.dropout(self.feed_forward(",
        MODEL,
    ),
]

MISTAKES += [
    Mistake(
        "window one too wide", "CMHA/masks.py", "(queries - keys < self.window)", "(queries - keys <= self.window)",
        MASKS,
    ),
    Mistake(
        "documents ignored", "CMHA/masks.py", "        if self.documents is not None:\n            of_queries",
        "        if False:\n            of_queries", MASKS,
    ),
    Mistake(
        "a tile that a window hides is skipped one too early", "CMHA/masks.py",
        "max(0, first - self.window + 1)", "max(0, first - self.window + 2)", MASKS,
    ),
    Mistake(
        "a table for every layer", "CMHA/masks.py", "if name not in self._derived:", "if True:", MASKS,
    ),
    Mistake(
        "a fallback in silence", "CMHA/choosing/choose.py", "    warn_of_fallback(choice, caller)\n    return choice",
        "    return choice", CHOOSING,
    ),
    Mistake(
        "strict falls back", "CMHA/choosing/choose.py", "if settings.attn_strict and requested != AUTO:",
        "if False:", CHOOSING,
    ),
    Mistake(
        "the guard of MPS forgotten", "CMHA/implementations/sdpa.py",
        'if request.device == "mps" and request.mps_guard:', "if False:", CHOOSING,
    ),
    Mistake(
        "auto never asks flash-attn", "CMHA/choosing/choose.py", 'FALLBACK_ORDER if request.device == "cuda" else',
        "FALLBACK_ORDER[-2:] if True else", CHOOSING,
    ),
    Mistake(
        "packed sequences run together", "CMHA/implementations/flash_package.py",
        "names = torch.stack([row, documents[row, position].long()])",
        "names = torch.stack([row * 0, documents[row, position].long()])", PACKAGES,
    ),
    Mistake(
        "layout not swapped for the packages", "CMHA/implementations/flash_package.py",
        "tensor.to(queries.dtype).transpose(1, 2) for tensor", "tensor.to(queries.dtype) for tensor", PACKAGES,
    ),
    Mistake(
        "rows that see nothing may be almost zero", "orchestrator/evaluation/parity.py",
        "found[\"context\"].to(empty.device)[empty] != 0", "found[\"context\"].to(empty.device)[empty] > 1", MASKS,
    ),
    Mistake(
        "a NaN passes the bound", "orchestrator/evaluation/parity.py", "if not self.error[key] <= self.bound[key]",
        "if self.error[key] > self.bound[key]", MASKS,
    ),
]  # fmt: skip

TRACING = ("tests/CMHA/test_tap.py", "tests/GPT2Model/test_tracing.py")
MISTAKES += [
    Mistake(
        "a listener's answer thrown away", "CMHA/tap.py",
        "return tensor if _listener is None else _listener(name, tensor, **where)",
        "return tensor if _listener is None else (_listener(name, tensor, **where), tensor)[1]", TRACING,
    ),
    Mistake(
        "a tap that costs an operation", "CMHA/tap.py", "return tensor if _listener is None else",
        "return tensor.view_as(tensor) if _listener is None else", TRACING,
    ),
    Mistake(
        "a trace leaves its hooks behind", "GPT2Model/trace_recorder.py", "stack.callback(before.remove)", "del before",
        TRACING,
    ),
    Mistake(
        "recomputed weights without the scale", "GPT2Model/trace_recorder.py", '"scale": module.head_dim**-0.5',
        '"scale": 1.0', TRACING,
    ),
    Mistake(
        "a patch writes into the model's own value", "GPT2Model/trace_recorder.py", "patch(tensor.clone())",
        "patch(tensor)", TRACING,
    ),
    Mistake(
        "a patch of a value beside the pass is taken for one", "GPT2Model/trace_recorder.py",
        "        if self.recomputing:  # beside", "        if False:  # beside", TRACING,
    ),
    Mistake(
        "rounding taken for a difference", "GPT2Model/trace_diff.py", "row.verdict in (PARTED, SHAPE)",
        "row.verdict in (ROUNDED, PARTED, SHAPE)", TRACING,
    ),
    Mistake(
        "NaN taken for equal", "GPT2Model/trace_diff.py", 'apart.masked_fill(apart.isnan(), float("inf"))',
        "apart.masked_fill(apart.isnan(), 0.0)", TRACING,
    ),
]  # fmt: skip

MISTAKES += [
    Mistake(
        "rotary: neighbours as pairs",
        "CMHA/rotary.py",
        "first, second = x.to(cos.dtype).chunk(2, dim=-1)",
        "first, second = x.to(cos.dtype)[..., ::2], x.to(cos.dtype)[..., 1::2]",
        VARIANTS,
    ),
    Mistake("rotary: keys not turned", "CMHA/rotary.py", "return turn(queries, cos, sin), turn(keys, cos, sin)",
            "return turn(queries, cos, sin), keys", VARIANTS),
    Mistake("rotary: angles in float32", "CMHA/rotary.py", 'if positions.device.type == "mps" else', "if True else",
            VARIANTS),
    Mistake("rotary: computed in bfloat16", "CMHA/rotary.py", "torch.promote_types(queries.dtype, torch.float32)",
            "queries.dtype", VARIANTS),
    Mistake("rotary: values turned", "CMHA/cmha.py", "queries, keys = self.rotary(queries, keys, mask)",
            "queries, keys = self.rotary(queries, keys, mask); values = self.rotary(queries, values, mask)[1]",
            VARIANTS),
    Mistake("positions: padding counted", "CMHA/masks.py",
            "if self.padding_mask is not None:\n            before =", "if False:\n            before =", VARIANTS),
    Mistake("positions: documents go on", "CMHA/masks.py", "        if self.documents is not None:  # less",
            "        if False:  # less", VARIANTS),
    Mistake("rms: the mean taken off", "TransformerBlock/variants.py",
            "F.rms_norm(x, self.weight.shape, self.weight, self.EPS)",
            "F.layer_norm(x, self.weight.shape, self.weight, None, self.EPS)", VARIANTS),
    Mistake("rms: another epsilon", "TransformerBlock/variants.py", "EPS = 1e-5", "EPS = 1e-6", VARIANTS),
    Mistake("swiglu: gate and up swapped", "TransformerBlock/variants.py",
            "F.silu(self.gate_proj(x)) * self.up_proj(x)", "self.gate_proj(x) * F.silu(self.up_proj(x))", VARIANTS),
    Mistake("groups taken in turn", "CMHA/implementations/eager.py",
            "keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)",
            "keys.repeat(1, group, 1, 1), values.repeat(1, group, 1, 1)", VARIANTS),
]  # fmt: skip

BLOCKS = ("tests/orchestrator/serving/test_block_manager.py",)
SERVING = tuple(f"tests/orchestrator/serving/test_{name}.py" for name in ("scheduler", "engine", "engine_faults"))
SAMPLING = ("tests/GPT2Model/test_sampling.py",)
SPECULATIVE = ("tests/GPT2Model/test_speculative.py",)
PAGES = ("tests/CMHA/implementations/test_paged_attention.py", "tests/CMHA/test_paged_kv_cache.py")
MISTAKES += [
    Mistake("pages: no copy on write", "orchestrator/serving/block_manager.py",
            "return slot > 0 and self._counts[table.blocks[next_block]] > 1", "return False", BLOCKS),
    Mistake("pages: a block evicted but still found", "orchestrator/serving/block_manager.py",
            "del self._findable[self._prefixes.pop(block).hash]", "self._prefixes.pop(block)", BLOCKS),
    Mistake("pages: unfilled places of the last block are read", "CMHA/implementations/paged_plain.py",
            ".flatten(0, 1)[:length]", ".flatten(0, 1)", PAGES),
    Mistake("pages: a shared block is written", "CMHA/paged_kv_cache.py", "if len(set(slots)) < total:", "if False:",
            PAGES),
    Mistake("serving: the first that came is preempted", "orchestrator/serving/scheduler.py",
            "last = self.running[-1]", "last = self.running[0]", SERVING),
    Mistake("serving: the small overtake the large", "orchestrator/serving/scheduler.py",
            "sample = self.waiting.pop(0)", "sample = self.waiting.pop()", SERVING),
    Mistake("exact gelu by tanh", "TransformerBlock/variants.py", "layer.gelu = nn.GELU()",
            "layer.gelu = nn.GELU(approximate='tanh')", VARIANTS),
    Mistake("nanoGPT opened by tanh", "GPT2Model/weights/foreign_configs.py", 'return {**sizes, "mlp": "gelu_exact"}',
            "return sizes", ("tests/GPT2Model/weights/test_weight_formats.py",)),
    Mistake("serving: a prompt half read gets its next token", "orchestrator/serving/engine.py",
            "            if sample.unread:\n                continue\n", "", SERVING),
    Mistake("serving: blocks are not copied", "orchestrator/serving/engine.py",
            "self.cache.copy_block(copy.source, copy.target)", "pass", SERVING),
    Mistake("serving: all samples draw with one seed", "orchestrator/serving/request.py",
            "Sampler(for_row(request.sampling, index), device)", "Sampler(request.sampling, device)", SERVING),
    Mistake("serving: a failed step is taken for done", "orchestrator/serving/engine.py",
            "            self._start_over()\n            raise", "            raise", SERVING),
    Mistake("serving: half a token is kept", "orchestrator/serving/request.py", "self.is_half_written = True  # from",
            "self.is_half_written = False  # from", SERVING),
    Mistake("serving: one text's fault ends the step", "orchestrator/serving/engine.py",
            "        except Exception as error:\n            logger.warning(", 
            "        except ZeroDivisionError as error:\n            logger.warning(", SERVING),
    Mistake("sampling: min-p absolute", "GPT2Model/sampling.py",
            "least = min_p * probabilities.amax(dim=-1, keepdim=True)", "least = min_p", SAMPLING),
    Mistake("sampling: the penalty raises negative logits", "GPT2Model/sampling.py",
            "torch.where(logits[seen] > 0", "torch.where(logits[seen] > -1e30", SAMPLING),
    Mistake("speculative: the rest is p", "GPT2Model/speculative.py", "rest = (p - q).clamp(min=0)", "rest = p",
            SPECULATIVE),
    Mistake("speculative: the model's cache is not cut", "GPT2Model/speculative.py",
            "            judge.forget(text)\n", "", SPECULATIVE),
]  # fmt: skip


def plant(mistake: Mistake, place: Path) -> subprocess.CompletedProcess:
    """Copy the project to `place`, make it wrong, and run the tests that should see it until the first fails."""
    for room in ROOMS:
        source = ROOT / room
        if source.is_dir():
            shutil.copytree(source, place / room, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, place / room)
    file = place / mistake.file
    text = file.read_text(encoding="utf-8")
    if text.count(mistake.right) != 1:
        raise SystemExit(
            f"{mistake.name}: {mistake.right!r} stands {text.count(mistake.right)} times in {mistake.file}"
        )
    file.write_text(text.replace(mistake.right, mistake.wrong), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *mistake.tests]
    return subprocess.run(command, cwd=place, capture_output=True, text=True)


def main(words: list[str]) -> int:
    unnoticed, lines = [], []
    for mistake in tqdm([m for m in MISTAKES if all(word in m.name for word in words)], unit="mistake"):
        with tempfile.TemporaryDirectory() as place:
            done = plant(mistake, Path(place))
        failed = re.findall(r"^FAILED (\S+)", done.stdout, flags=re.M)
        if done.returncode != 1 or not failed:  # 2 and more: the tests did not even run
            unnoticed.append(mistake.name)
        lines.append(f"{mistake.name:42} {failed[0] if failed else f'NOT CAUGHT (exit code {done.returncode})'}")
    print("\n".join(lines))
    print(f"{len(lines) - len(unnoticed)} of {len(lines)} mistakes were caught")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
