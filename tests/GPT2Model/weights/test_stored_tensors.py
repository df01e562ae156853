"""Weights in files: read to the bit as the safetensors library does, one by one, and never before they would fit."""

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

from GPT2Model.gpt2 import GPTModel
from GPT2Model.pretrained import load
from GPT2Model.weights import stored_tensors
from GPT2Model.weights.stored_tensors import DTYPES, ModelTooLargeError, open_safetensors
from orchestrator.evaluation.memory import peak_tensor_bytes


def test_every_dtype_and_shape_is_read_as_the_library_reads_it(tmp_path):
    torch.manual_seed(0)
    shapes = {"matrix": (3, 5), "vector": (7,), "number": (), "nothing": (0, 4), "cube": (2, 3, 4)}
    written = {
        f"{kind}.{name}": torch.randint(-100, 100, shape).to(dtype) if dtype != torch.bool else torch.rand(shape) > 0.5
        for kind, dtype in DTYPES.items()
        for name, shape in shapes.items()
    }
    safetensors.torch.save_file(written, tmp_path / "all.safetensors", metadata={"format": "pt"})
    stored = open_safetensors(tmp_path / "all.safetensors")
    library = safetensors.torch.load_file(tmp_path / "all.safetensors")
    assert stored.keys() == library.keys() == written.keys()
    for name, tensor in library.items():
        assert stored[name].shape == tuple(tensor.shape)
        assert stored[name].dtype == tensor.dtype
        assert stored[name].nbytes() == tensor.nbytes
        assert torch.equal(stored[name].read().view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), name
    assert torch.equal(stored["F32.matrix"].T.read(), library["F32.matrix"].T)


GOOD = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
BROKEN = {  # header, bytes of numbers, what is said
    "numbers cut short": (GOOD, 20, "tells of 24 bytes of numbers, and 20 are there"),
    "more behind": (GOOD, 25, "tells of 24 bytes of numbers, and 25 are there"),
    "a gap": ({"a": GOOD["a"], "b": {"dtype": "F32", "shape": [1], "data_offsets": [28, 32]}}, 32, "place of b"),
    "an overlap": ({"a": GOOD["a"], "b": {"dtype": "F32", "shape": [1], "data_offsets": [20, 24]}}, 24, "place of b"),
    "a wrong size": ({"a": {**GOOD["a"], "shape": [2, 4]}}, 24, "a, (2, 4) in F32, does not take 24 bytes"),
    "a negative size": ({"a": {**GOOD["a"], "shape": [-2, -3]}}, 24, "place of a"),
    "an unknown dtype": ({"a": {**GOOD["a"], "dtype": "F4"}}, 24, "a is stored as F4; known are F64, F32"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2, 3]}}, 24, "KeyError"),
    "a list": ([1, 2], 24, "cut short, or something else"),
    "a number": (7, 24, "cut short, or something else"),
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
def test_a_header_that_lies_about_its_file_is_refused(broken, tmp_path):
    header, size, said = BROKEN[broken]
    text = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    with pytest.raises(ValueError, match="cannot be read as weights") as caught:
        open_safetensors(file)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(safetensors.SafetensorError):  # the library refuses it too
        safetensors.torch.load_file(file)


@pytest.mark.parametrize(
    "start",
    [b"", b"\x01", struct.pack("<Q", 2**62) + b"{}", struct.pack("<Q", 500) + b"{}", struct.pack("<Q", 1) + b"{"],
)
def test_a_file_without_a_whole_header_is_refused(start, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(start)
    with pytest.raises(ValueError, match="cut short"):
        open_safetensors(tmp_path / "model.safetensors")


def test_a_header_of_brackets_alone_is_refused_and_does_not_end_python(tmp_path):
    text = b"[" * 100_000
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ValueError, match="cannot be read as weights"):
        open_safetensors(tmp_path / "model.safetensors")


def test_a_file_that_became_shorter_since_it_was_opened_is_refused_when_it_is_read(tmp_path):
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.ones(100)}, file)
    stored = open_safetensors(file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="it became shorter"):
        stored["a"].read()


# --- memory ------------------------------------------------------------------------------------------


def giant_folder(folder, dtype="F32", width=2**20, layers=2):
    """A GPT-2 of terabytes, of which the header alone is on the disk: the rest of the file is a hole."""
    folder.mkdir()
    sizes = {"vocab_size": 50257, "n_positions": 1024, "n_embd": width, "n_head": 16, "n_layer": layers}
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))
    small = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes | {"n_embd": 32}))
    header, end = {}, 0
    for name, tensor in small.state_dict().items():
        shape = [n * width // 32 if n in (32, 96, 128) else n for n in tensor.shape]
        size = math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return end


def test_a_model_of_terabytes_is_refused_with_both_figures_before_anything_is_read(tmp_path):
    width = 2**17  # two blocks of 12 * width^2 numbers
    size = giant_folder(tmp_path / "giant", width=width)
    assert size > 1.6e12
    caught = []

    def try_it():
        with pytest.raises(MemoryError) as error:
            GPTModel.from_pretrained(tmp_path / "giant")
        caught.append(str(error.value))

    peak = peak_tensor_bytes(try_it)
    assert peak.largest < 4096  # not even one LayerNorm was read
    (message,) = caught
    largest = 4 * width * 4 * width
    assert f"is a model of {(size + largest) / 2**30:,.1f} GiB" in message
    assert "of memory are free here: nothing of it was read" in message
    assert "choose a smaller model" in message
    assert "bfloat16" not in message  # it would not fit so either
    assert len(message.splitlines()) == 1
    with pytest.raises(ValueError, match="nothing of it was read"):  # for those who catch ValueError
        GPTModel.from_pretrained(tmp_path / "giant")


def test_what_fits_in_fewer_bytes_is_said_with_the_dtype_to_pass(build, tmp_path, monkeypatch):
    build(torch.float32).save_pretrained(tmp_path)
    stored = open_safetensors(tmp_path / "model.safetensors")
    numbers = sum(tensor.nbytes() // 4 for tensor in stored.values())
    largest = max(tensor.nbytes() // 4 for tensor in stored.values())
    monkeypatch.setattr(stored_tensors, "free_memory", lambda: 4 * (numbers + largest))
    load(tmp_path)
    monkeypatch.setattr(stored_tensors, "free_memory", lambda: 4 * (numbers + largest) - 1)
    with pytest.raises(ModelTooLargeError, match=r"it opens with dtype=torch\.bfloat16; else close"):
        load(tmp_path)
    assert load(tmp_path, dtype=torch.bfloat16).head.weight.dtype == torch.bfloat16
    monkeypatch.setattr(stored_tensors, "free_memory", lambda: 2 * (numbers + largest) - 1)
    with pytest.raises(ModelTooLargeError, match=r"are free here: nothing of it was read\. Close what else"):
        load(tmp_path, dtype=torch.bfloat16)
    with pytest.raises(ModelTooLargeError):  # a state dict in memory would be there twice
        load(build(torch.float32).state_dict(), build().cfg)


def test_an_old_torch_file_larger_than_memory_is_refused_before_it_is_read(build, tmp_path, monkeypatch):
    torch.save(build().state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert load(tmp_path / "old.pt", build().cfg).cfg == build().cfg
    monkeypatch.setattr(stored_tensors, "free_memory", lambda: (tmp_path / "old.pt").stat().st_size - 1)
    with pytest.raises(ModelTooLargeError, match=r"nothing of it was read\. Pass a safetensors file"):
        load(tmp_path / "old.pt", build().cfg)


@pytest.mark.parametrize("way", ["one file", "shards"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["as stored", "to bf16"])
def test_opening_a_model_takes_its_own_memory_and_that_of_one_weight(way, dtype, tmp_path):
    config = transformers.GPT2Config(vocab_size=500, n_positions=64, n_embd=128, n_head=4, n_layer=6)
    size = "1GB" if way == "one file" else "300KB"
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path, max_shard_size=size)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) == 1) == (way == "one file")
    models = []
    peak = peak_tensor_bytes(lambda: models.append(load(tmp_path, dtype=dtype))).peak
    model_bytes = sum(parameter.nbytes for parameter in models[0].parameters())
    largest = 4 * max(parameter.numel() for parameter in models[0].parameters())
    assert peak <= model_bytes + 2 * largest + 50_000  # as stored, and turned or converted


def test_opening_a_model_draws_no_random_numbers(build, tmp_path):
    build().save_pretrained(tmp_path)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    GPTModel.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_opening_a_model_does_not_wake_the_compiler(build, tmp_path):
    """Numbers drawn on a device without memory would: hundreds of modules, and two seconds at every start."""
    build(torch.float32).save_pretrained(tmp_path)
    program = f"from GPT2Model.pretrained import load; import sys; load({str(tmp_path)!r})"
    program += "; print([name for name in ('torch._dynamo', 'torch._inductor') if name in sys.modules])"
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    done = subprocess.run([sys.executable, "-c", program], env=here, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
