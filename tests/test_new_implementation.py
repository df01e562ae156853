"""An implementation is added in one file and one line, and is then everywhere: tried on a copy of the project."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
REGISTRY = "CMHA/implementations/__init__.py"
FILE = '''"""Attention summed key by key, the slowest way there is."""

import torch

from CMHA.request import AttentionRequest, Reason

SUMMARY = "one key at a time"
ALIASES = ("one_by_one",)


def check(request: AttentionRequest) -> list[Reason]:
    return [Reason("too_long", "it would take all day", "use sdpa")] if request.key_len > 1024 else []


def attention(queries, keys, values, mask, *, scale, dropout=0.0):
    group = queries.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
    scores = (queries.float() @ keys.float().mT * scale).masked_fill(~mask.dense(), -1e30)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True).detach()) * mask.dense()
    total = weights.sum(-1, keepdim=True)
    context = sum(weights[..., key, None] * values[:, :, None, key].float() for key in range(keys.shape[2]))
    return (context / total.masked_fill(total == 0, 1)).to(queries.dtype), None
'''


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with one more file and one more line."""
    place = tmp_path_factory.mktemp("project")
    for room in ("CMHA", "TransformerBlock", "GPT2Model", "orchestrator"):
        shutil.copytree(ROOT / room, place / room, ignore=shutil.ignore_patterns("__pycache__"))
    (place / "CMHA" / "implementations" / "key_by_key.py").write_text(FILE)
    registry = (place / REGISTRY).read_text()
    last = '    "flex_attention",\n'
    assert registry.count(last) == 1
    (place / REGISTRY).write_text(registry.replace(last, last + '    "key_by_key",\n'))  # the one line
    return place


def run(project, *command) -> str:
    done = subprocess.run([sys.executable, *command], cwd=project, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_parity_measures_it(project):
    few = ["--implementations", "one_by_one", "--dtype", "bfloat16", "--part", "1/4", "--out", "out"]
    printed = run(project, "-m", "orchestrator", "parity", "--device", "cpu", *few)
    assert "key_by_key" in printed
    report = json.loads((project / "out" / "parity.json").read_text())
    assert [row["implementation"] for row in report["summary"]] == ["key_by_key"]
    assert report["summary"][0]["cases"] > 10


def test_doctor_says_what_it_would_give_and_why_not(project):
    assert "key_by_key" in run(project, "-m", "orchestrator", "doctor")
    assert "key_by_key" in json.dumps(json.loads(run(project, "-m", "orchestrator", "doctor", "--json")))


def test_it_stands_in_both_tables(project):
    table = run(project, "-m", "CMHA.choosing.compatibility")
    (row,) = [line for line in table.splitlines() if line.startswith("| `key_by_key`")]
    assert "yes" in row
    names = run(project, "-c", "from CMHA.choosing.names import markdown_table; print(markdown_table())")
    assert "| `key_by_key` (`one_by_one`) | one key at a time |" in names


def test_a_model_takes_it_by_its_alias_and_falls_back_with_its_own_reason(project):
    code = """
from CMHA.choosing import AttentionSettings, choose
from CMHA.cmha import MultiHeadAttention
from CMHA.request import AttentionRequest
import torch
layer = MultiHeadAttention(8, 8, 9, 0.0, 2, attn_implementation="one_by_one")
x = torch.randn(1, 9, 8)
out = layer(x)
layer.set_attention("eager")
print(layer.choice().chosen, float((layer(x) - out).abs().max()) < 1e-5)
choice = choose(AttentionSettings(attn_implementation="one_by_one"), AttentionRequest(key_len=2000))
print(choice.chosen, choice.explain())
"""
    lines = run(project, "-c", code).splitlines()
    assert lines == ["eager True", "sdpa key_by_key: it would take all day"]
