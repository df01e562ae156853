"""Weights split over files, as transformers splits them: the same numbers, and an index held against its files."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from GPT2Model.gpt2 import GPTModel

SIZES = {"vocab_size": 61, "n_positions": 24, "n_embd": 30, "n_head": 5, "n_layer": 3, "bos_token_id": 0,
         "eos_token_id": 0}  # fmt: skip
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def oracle(perturb):
    torch.manual_seed(0)
    config = transformers.GPT2Config(**SIZES, attn_implementation="eager")
    return perturb(transformers.GPT2LMHeadModel(config)).eval()


@pytest.fixture
def folder(oracle, tmp_path):
    oracle.save_pretrained(tmp_path / "model", max_shard_size="30KB")
    assert len(list((tmp_path / "model").glob("model-*-of-*.safetensors"))) > 4
    return tmp_path / "model"


@pytest.fixture
def torch_folder(folder):
    """The same as older versions of transformers wrote it: shards of torch.save."""
    index = json.loads((folder / INDEX).read_text())
    for shard in set(index["weight_map"].values()):
        torch.save(load_file(folder / shard), folder / shard.replace(".safetensors", ".bin"))
        (folder / shard).unlink()
    index["weight_map"] = {n: shard.replace(".safetensors", ".bin") for n, shard in index["weight_map"].items()}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / INDEX).unlink()
    return folder


def refused(source, kind=ValueError) -> str:
    with pytest.raises(kind) as caught:
        GPTModel.from_pretrained(source)
    return str(caught.value)


def change(folder, **changes):
    """Change the index's weight_map: a name's file, or None to leave it out."""
    index = json.loads((folder / INDEX).read_text())
    place = {**index["weight_map"], **{name.replace("__", "."): file for name, file in changes.items()}}
    index["weight_map"] = {name: file for name, file in place.items() if file is not None}
    (folder / INDEX).write_text(json.dumps(index))


def test_a_folder_that_transformers_split_gives_its_logits_here(folder, oracle, random_ids, tmp_path):
    model, ids = GPTModel.from_pretrained(folder), random_ids(2, 24)
    torch.testing.assert_close(model(ids), oracle(ids).logits, atol=2e-5, rtol=0)
    oracle.save_pretrained(tmp_path / "whole")
    whole = GPTModel.from_pretrained(tmp_path / "whole").state_dict()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items())


def test_shards_of_torch_files_give_the_same_model(torch_folder, oracle, random_ids):
    ids = random_ids(2, 24)
    torch.testing.assert_close(GPTModel.from_pretrained(torch_folder)(ids), oracle(ids).logits, atol=2e-5, rtol=0)


def test_all_missing_shards_are_named(folder):
    shards = sorted(path.name for path in folder.glob("model-*.safetensors"))
    for shard in shards[1:3]:
        (folder / shard).unlink()
    message = refused(folder, FileNotFoundError)
    assert f"has {len(shards) - 2} of the {len(shards)} files that {INDEX} names" in message
    assert f"Missing: {shards[1]}, {shards[2]}. " in message


def test_every_tensor_on_which_index_and_files_disagree_is_named(folder):
    place = json.loads((folder / INDEX).read_text())["weight_map"]
    first, last = "transformer.wte.weight", "transformer.ln_f.weight"
    assert place[first] != place[last]
    change(folder, **{first: place[last], last: None, "transformer.h.0.new": place[first]})
    lines = refused(folder).splitlines()
    assert "do not agree: copy them anew" in lines[0]
    assert sorted(lines[1:]) == sorted([
        f"  - {first} is in {place[first]}, and the index has it in {place[last]}",
        f"  - {first} is not in {place[last]}, where the index has it",
        f"  - {last} is in {place[last]}, and the index does not name it",
        f"  - transformer.h.0.new is not in {place[first]}, where the index has it",
    ])  # fmt: skip


@pytest.mark.parametrize(
    "path", ["../secret.safetensors", "/etc/secret.safetensors", "a/../../secret.safetensors", "..\\secret.safetensors",
             "C:\\secret.safetensors", "C:secret.safetensors", "\\\\host\\secret.safetensors", ""],
)  # fmt: skip
def test_a_path_that_leaves_the_folder_is_refused_and_not_opened(path, folder):
    save_file({"transformer.ln_f.weight": torch.ones(30)}, folder.parent / "secret.safetensors")
    change(folder, transformer__ln_f__weight=path)
    message = refused(folder)
    assert "names files outside its folder" in message
    assert "Nothing was opened" in message


def test_files_below_the_folder_and_links_out_of_it_are_opened(folder, oracle, random_ids):
    """The hub's cache is made of links, from snapshots to blobs."""
    place = json.loads((folder / INDEX).read_text())["weight_map"]
    shard = place["transformer.ln_f.weight"]
    (folder / "parts").mkdir()
    shutil.move(folder / shard, folder.parent / "blob")
    (folder / "parts" / shard).symlink_to(folder.parent / "blob")
    change(folder, **{name: f"parts/{shard}" for name, file in place.items() if file == shard})
    ids = random_ids(1, 24)
    torch.testing.assert_close(GPTModel.from_pretrained(folder)(ids), oracle(ids).logits, atol=2e-5, rtol=0)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', "[" * 99_999])
def test_an_index_that_is_none_is_refused_in_one_line(text, folder):
    (folder / INDEX).write_text(text)
    message = refused(folder)
    assert f"{folder / INDEX} is no index of weights" in message
    assert "weight_map" in message
    assert len(message.splitlines()) == 1


def test_all_damaged_shards_are_named_a_line_each(folder):
    shards = sorted(folder.glob("model-*.safetensors"))
    shards[0].write_bytes(shards[0].read_bytes()[:-10])
    shards[2].write_bytes(b"")
    lines = refused(folder).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"{shards[0]} cannot be read as weights: it is cut short")
    assert lines[1].startswith(f"{shards[2]} cannot be read as weights: it is cut short")


def test_a_damaged_shard_of_torch_s_own_is_refused_too(torch_folder):
    shard = min(torch_folder.glob("model-*.bin"))
    shard.write_bytes(shard.read_bytes()[:-30])
    assert f"{shard} cannot be read as weights: it is cut short" in refused(torch_folder)


def test_an_index_of_another_model_s_tensors_is_refused_by_what_is_missing(folder):
    place = json.loads((folder / INDEX).read_text())["weight_map"]
    gone = [name for name in place if name.endswith("ln_1.bias")]
    for shard in set(place.values()):
        tensors = load_file(folder / shard)
        save_file({name: tensor for name, tensor in tensors.items() if name not in gone}, folder / shard)
    change(folder, **dict.fromkeys(gone))
    assert "  - blocks 0 to 2: norm_1.bias is missing" in refused(folder)
