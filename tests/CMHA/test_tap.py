"""A tap is nothing when nobody listens, and lets one listener see and replace a value."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from CMHA.cmha import MultiHeadAttention
from CMHA.tap import listening, tap

ROOT = Path(__file__).resolve().parents[2]


def test_without_a_listener_it_is_the_very_tensor():
    x = torch.randn(3)
    assert tap("x", x) is x


def test_a_listener_sees_the_value_and_what_it_returns_goes_on():
    heard = []

    def listener(name, tensor, **where):
        heard.append((name, tensor, where))
        return tensor + 1

    x = torch.zeros(2)
    with listening(listener):
        assert torch.equal(tap("x", x, rows=slice(0, 2)), torch.ones(2))
    assert heard == [("x", x, {"rows": slice(0, 2)})]
    assert tap("x", x) is x


def test_the_listener_goes_after_an_error_too():
    with pytest.raises(ZeroDivisionError), listening(lambda name, tensor: tensor):
        raise ZeroDivisionError
    x = torch.zeros(2)
    assert tap("x", x) is x


def test_two_listeners_at_once_are_refused():
    with (
        listening(lambda name, tensor: tensor),
        pytest.raises(RuntimeError, match="listens to the taps already"),
        listening(lambda name, tensor: tensor),
    ):
        pass


@pytest.mark.parametrize(("name", "taps"), [("eager", 7), ("sdpa", 4)])
def test_attention_has_its_taps(name, taps):
    layer = MultiHeadAttention(8, 8, 16, 0.0, 2, attn_implementation=name)
    heard = []
    with listening(lambda name, tensor: heard.append(name) or tensor):
        layer(torch.randn(1, 5, 8))
    assert len(heard) == taps
    assert heard[:3] == ["queries", "keys", "values"]
    assert heard[-1] == "context"


GRAPHS = """
import sys
import torch
import CMHA.cmha, CMHA.implementations.eager, TransformerBlock.transformer_block
from GPT2Model.config import from_preset
from GPT2Model.gpt2 import GPTModel

name, taps = sys.argv[1:]
stand_ins = {"none": lambda name, tensor: tensor, "adds": lambda name, tensor: tensor + 0.0}
for module in (CMHA.cmha, CMHA.implementations.eager, TransformerBlock.transformer_block):
    assert hasattr(module, "tap")
    if taps != "as written":
        module.tap = stand_ins[taps]


def backend(graph, inputs):
    print("GRAPH", graph.code)
    return graph.forward


torch.manual_seed(0)
cfg = from_preset("nano", vocab_size=50, n_layers=2, emb_dim=16, n_heads=2, attn_implementation=name)
model = torch.compile(GPTModel(cfg).eval(), backend=backend)
with torch.no_grad():
    model(torch.arange(7)[None])
"""


def compiled_graphs(name: str, taps: str) -> list[str]:
    """Every graph that torch.compile makes of a model's forward, as code; in a process of its own."""
    done = subprocess.run([sys.executable, "-c", GRAPHS, name, taps], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return re.split(r"^GRAPH", done.stdout, flags=re.M)[1:]


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_the_compiled_graph_is_the_one_without_taps(name):
    """torch.compile gets the same graphs, as many of them, as from code in which no tap was ever written."""
    as_written = compiled_graphs(name, "as written")
    assert sum(graph.count("linear") for graph in as_written) >= 2 * 4
    assert as_written == compiled_graphs(name, "none")
    assert as_written != compiled_graphs(name, "adds")  # a tap that did anything would be seen
