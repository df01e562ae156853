"""Models by name: fetched by the real huggingface_hub from a hub on this machine, from its cache, or with advice.

The hub is a small server in this file that speaks the requests a download takes; without it, nothing listens, or
HF_HUB_OFFLINE is set: no request leaves this machine.
"""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file

from GPT2Model.config import from_preset
from GPT2Model.gpt2 import GPTModel
from GPT2Model.tokenizer_files import tokenizer_from_folder, tokenizer_texts
from GPT2Model.weights.hub import TOKENIZER, hub_id, hub_names

REPOSITORY = Path(__file__).resolve().parents[3]
COMMIT = hashlib.sha1(b"a commit").hexdigest()


class Hub:
    """A hub with one model: {path: bytes}. `fetched` lists the files that clients took from it."""

    def __init__(self, repository: str, files: dict[str, bytes], refuse: tuple[int, str] | None = None):
        self.fetched = fetched = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def answer(self, body=b"", status=200, **headers):
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                for key, value in headers.items():
                    self.send_header(key.replace("_", "-"), value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def do_GET(self):
                path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
                if refuse:
                    return self.answer(status=refuse[0], X_Error_Code=refuse[1])
                if path.startswith(f"/api/models/{repository}/tree/"):
                    tree = [{"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                            for name, body in files.items()]  # fmt: skip
                    return self.answer(json.dumps(tree).encode())
                if path.startswith(f"/api/models/{repository}"):
                    siblings = [{"rfilename": name} for name in files]
                    info = {"id": repository, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
                    return self.answer(json.dumps({**info, "downloads": 0, "likes": 0}).encode())
                if path.startswith(f"/{repository}/resolve/"):
                    name = path.split("/resolve/")[1].partition("/")[2]
                    if self.command == "GET":
                        fetched.append(name)
                    etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
                    return self.answer(files[name], ETag=etag, X_Repo_Commit=COMMIT)
                return self.answer(status=404, X_Error_Code="RepoNotFound")

            do_HEAD = do_GET  # noqa: N815

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub's, and no way to the real one."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    return tmp_path / "cache"


@pytest.fixture
def reach(monkeypatch):
    def reach(hub: Hub) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(
            huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE",
            hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )  # fmt: skip

    return reach


@pytest.fixture
def model(build):
    return build(torch.float32)


@pytest.fixture
def files(model, tmp_path):
    """What the hub has of a model, with files that nobody needs here."""
    model.save_pretrained(tmp_path / "published")
    files = {path.name: path.read_bytes() for path in (tmp_path / "published").iterdir()}
    return {**files, "README.md": b"about", "tf_model.h5": b"x" * 100, "onnx/model.onnx": b"y" * 100,
            "pytorch_model.bin": b"not needed: there is a safetensors file"}  # fmt: skip


def refused(source, kind=FileNotFoundError) -> str:
    with pytest.raises(kind) as caught:
        GPTModel.from_pretrained(source)
    return str(caught.value)


def same(one: GPTModel, other: GPTModel) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


def lay_out(cache: Path, repository: str, files: dict[str, bytes]) -> Path:
    """A cache as huggingface_hub leaves it: refs, blobs by hash, and a snapshot of links to them."""
    root = cache / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    for folder in (root / "refs", root / "blobs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text(COMMIT)
    for name, body in files.items():
        blob = hashlib.sha1(body).hexdigest()
        (root / "blobs" / blob).write_bytes(body)
        (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / blob)
    return snapshot


def test_the_names_are_openai_s_sizes_and_distilgpt2():
    assert hub_names() == ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2"]
    assert all(from_preset(name)["tie_weights"] for name in hub_names()[:4])
    assert hub_id("gpt2-xl") == "openai-community/gpt2-xl"
    assert hub_id("distilgpt2") == hub_id("distilbert/distilgpt2") == "distilbert/distilgpt2"
    assert hub_id("nano") is hub_id("a/b/c") is hub_id("..\\model") is None


@pytest.mark.parametrize("name", ["distilgpt2", "distilbert/distilgpt2"])
def test_a_model_is_fetched_once_and_then_opens_from_the_cache(name, model, files, reach, monkeypatch, cache):
    files |= {name: text.encode() for name, text in tokenizer_texts(get_small_tokenizer(), 24).items()}
    with Hub("distilbert/distilgpt2", files) as hub:
        reach(hub)
        assert same(GPTModel.from_pretrained(name), model)
        assert sorted(hub.fetched) == sorted(["config.json", "model.safetensors", *(set(files) & set(TOKENIZER))])
    assert same(GPTModel.from_pretrained(name), model)  # the server is gone
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert same(GPTModel.from_pretrained(name), model)
    snapshot = next((cache / "models--distilbert--distilgpt2" / "snapshots").iterdir())
    assert tokenizer_from_folder(snapshot).decode([7, 8]) == get_small_tokenizer().decode([7, 8])


def get_small_tokenizer():
    from GPT2Model.byte_level_bpe import CHARACTER_OF, ByteLevelBPE

    return ByteLevelBPE({character: byte for byte, character in CHARACTER_OF.items()}, [], (), None)


def test_a_model_in_shards_is_fetched_whole(perturb, tmp_path, reach, random_ids):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=61, n_positions=24, n_embd=30, n_head=5, n_layer=2)
    config._attn_implementation = "eager"
    oracle = perturb(transformers.GPT2LMHeadModel(config)).eval()
    oracle.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    files = {path.name: path.read_bytes() for path in (tmp_path / "shards").iterdir()}
    assert len([name for name in files if name.endswith(".safetensors")]) > 2
    ids = random_ids(1, 24)
    with Hub("somebody/their-gpt2", files) as hub:
        reach(hub)
        ours = GPTModel.from_pretrained("somebody/their-gpt2")
    torch.testing.assert_close(ours(ids), oracle(ids).logits, atol=2e-5, rtol=0)


def test_a_model_that_has_torch_files_alone_is_fetched_too(model, files, reach, tmp_path):
    torch.save(load_file(tmp_path / "published" / "model.safetensors"), tmp_path / "weights.bin")
    files = {"config.json": files["config.json"], "pytorch_model.bin": (tmp_path / "weights.bin").read_bytes()}
    with Hub("somebody/old", files) as hub:
        reach(hub)
        assert same(GPTModel.from_pretrained("somebody/old"), model)
        assert hub.fetched.count("pytorch_model.bin") == 1


def test_a_cache_as_the_hub_lays_it_out_opens_offline(model, files, cache):
    lay_out(cache, "openai-community/gpt2", {name: files[name] for name in ("config.json", "model.safetensors")})
    assert same(GPTModel.from_pretrained("gpt2"), model)
    assert same(GPTModel.from_pretrained("openai-community/gpt2"), model)


def test_a_cache_that_is_half_fetched_says_what_it_has_and_what_to_do(files, cache):
    snapshot = lay_out(cache, "openai-community/gpt2", {"config.json": files["config.json"]})
    message = refused("gpt2")
    assert f"{snapshot} has config.json" in message
    assert "model.safetensors" in message
    assert "call again, or on another machine download" in message


@pytest.mark.parametrize("name", ["gpt2", "gpt2-xl", "distilgpt2", "somebody/their-gpt2"])
def test_without_a_network_it_says_which_files_to_put_where_and_what_to_call(name, tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    message = refused(name)
    folder = tmp_path / name.rpartition("/")[2]
    assert f"{hub_id(name)} is not (whole) in the Hugging Face cache, and the hub cannot be reached" in message
    assert f"https://huggingface.co/{hub_id(name)}/tree/main" in message
    for file in ("config.json", "model.safetensors", "model.safetensors.index.json", "vocab.json", "merges.txt"):
        assert file in message
    assert f"put them into the folder\n  {folder}\n" in message
    call = message.splitlines()[-1].strip()
    assert call == f"GPTModel.from_pretrained({str(folder)!r})"
    model.save_pretrained(folder)  # done as told:
    assert same(eval(call, {"GPTModel": GPTModel}), model)
    if "/" not in name:
        assert same(GPTModel.from_pretrained(name), model)  # in that folder the name itself will do


def test_in_a_process_of_its_own_without_a_network_and_with_an_empty_home(tmp_path):
    program = "from GPT2Model.gpt2 import GPTModel\nGPTModel.from_pretrained('gpt2')"
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "FileNotFoundError: openai-community/gpt2 is not (whole) in the Hugging Face cache" in done.stderr
    assert f"GPTModel.from_pretrained({str(tmp_path / 'gpt2')!r})" in done.stderr


def test_a_name_that_the_hub_does_not_have_and_one_that_it_guards_are_told_apart(reach):
    for refuse, said in (((404, "RepoNotFound"), "has no public model 'no/such'"),
                         ((403, "GatedRepo"), "accept its terms there, log in with `hf auth login`")):  # fmt: skip
        with Hub("no/such", {}, refuse) as hub:
            reach(hub)
            message = refused("no/such")
        assert said in message
        assert "huggingface.co/no/such" in message


def test_a_preset_that_was_never_published_is_refused_without_asking():
    assert "'nano' is a preset without published weights. Names: gpt2, gpt2-medium" in refused("nano")


def test_what_is_no_name_and_no_folder_is_refused(tmp_path):
    for source in ("no such thing", str(tmp_path / "nowhere"), "a/b/c"):
        assert "no such folder or file. Names on the hub: gpt2, " in refused(source)
    assert "cannot be a name on the hub" in refused("-a-/b.")
