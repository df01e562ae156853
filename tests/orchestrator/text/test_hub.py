"""Hugging Face data sets: a copy in the data folder, the hub's cache, and a hub (one of ours, on this machine).

The client is the real huggingface_hub; the hub it talks to is a small server in this file that speaks the five requests
a download takes, so that downloading, the cache it leaves and its use without a network are run, not imitated.
"""

import hashlib
import http.server
import json
import socket
import sys
import threading
import urllib.parse

import datasets
import huggingface_hub
import pytest

from orchestrator.text import hub
from orchestrator.text.hub import DATASETS, download, hub_dataset, local_copy, split_of

WIKITEXT = DATASETS["wikitext"]
CONVERTED = "refs/convert/parquet"


def parquet_bytes(tmp_path, *texts):
    datasets.Dataset.from_dict({"text": list(texts)}).to_parquet(tmp_path / "one.parquet")
    return (tmp_path / "one.parquet").read_bytes()


class Hub:
    """A hub with one data set: {revision: {path: bytes}}. `asked` lists what clients asked of it."""

    def __init__(self, hub_id, revisions, refuse=None, cut=()):
        self.asked = asked = []
        shas = {revision: hashlib.sha1(revision.encode()).hexdigest() for revision in revisions}
        by_sha = {shas[revision]: files for revision, files in revisions.items()}

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
                asked.append(path)
                if refuse:
                    return self.answer(status=refuse[0], X_Error_Code=refuse[1])
                revision = path.partition("/revision/")[2]
                if path.startswith(f"/api/datasets/{hub_id}/") and revision:
                    if revision not in revisions:
                        return self.answer(status=404, X_Error_Code="RevisionNotFound")
                    siblings = [{"rfilename": name} for name in revisions[revision]]
                    info = {"id": hub_id, "sha": shas[revision], "siblings": siblings, "private": False, "tags": []}
                    return self.answer(json.dumps({**info, "downloads": 0, "likes": 0}).encode())
                if path.startswith(f"/api/datasets/{hub_id}/tree/"):
                    files = by_sha[path.split("/tree/")[1].split("/")[0]]
                    tree = [
                        {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                        for name, body in files.items()
                    ]
                    return self.answer(json.dumps(tree).encode())
                if path.startswith(f"/datasets/{hub_id}/resolve/"):
                    sha, _, name = path.split("/resolve/")[1].partition("/")
                    if name in cut and self.command == "GET":
                        return self.answer(status=403)
                    body = by_sha[sha][name]
                    return self.answer(body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=sha)
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
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # whoever runs the tests may have it set


@pytest.fixture
def nowhere():
    """An address of this machine at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    return address


def contents(files):
    return [file.read_bytes() for file in files]


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002.parquet", "train"),
        ("data/validation-00000-of-00001-869c898b519ad725.parquet", "validation"),
        ("default/test/0000.parquet", "test"),
        ("plain_text/partial-train/0000.parquet", "train"),
        ("TinyStoriesV2-GPT4-train.txt", "train"),
        ("TinyStories-valid.txt.gz", "validation"),
        ("wiki.valid.txt", "validation"),
        ("Val.jsonl", "validation"),
        ("dev/train.jsonl", "train"),  # the file's own name goes before its folder's
        ("sample/10BT/000_00000.parquet", None),
        ("crash-test-reports.txt", None),
        ("training.txt", None),
        ("contest.txt", None),
    ],
)
def test_a_file_says_its_split_by_its_name(name, split):
    assert split_of(name) == split


def test_names_mean_data_sets():
    assert hub_dataset("wikitext") == hub_dataset("WikiText") == hub_dataset("Salesforce/wikitext") == WIKITEXT
    assert WIKITEXT.config == "wikitext-103-raw-v1"
    assert hub_dataset("wikitext:wikitext-2-raw-v1") == WIKITEXT._replace(config="wikitext-2-raw-v1", asked=True)
    assert hub_dataset("someone/things").hub_id == "someone/things"
    assert hub_dataset("someone/things:part").config == "part"
    for name in ("wikitex", "a/b/c", "", "corpus/*.txt", "things:part"):
        assert hub_dataset(name) is None


def test_a_local_copy_in_the_layout_of_the_hub_is_found(tmp_path):
    touch(tmp_path, "README.md", ".cache/train.parquet", "wikitext-2-raw-v1/train-00000-of-00001.parquet")
    names = [f"train-0000{i}-of-00002.parquet" for i in range(2)]
    others = ["validation-00000-of-00001.parquet", "test-00000-of-00001.parquet"]
    touch(tmp_path / "wikitext-103-raw-v1", *names, *others)
    splits = local_copy(WIKITEXT, tmp_path)
    assert splits.train == tuple(tmp_path / "wikitext-103-raw-v1" / name for name in names)
    assert splits.validation == (tmp_path / "wikitext-103-raw-v1" / others[0],)
    small = local_copy(hub_dataset("wikitext:wikitext-2-raw-v1"), tmp_path)
    assert small.train == (tmp_path / "wikitext-2-raw-v1/train-00000-of-00001.parquet",)
    assert small.validation == ()
    with pytest.raises(ValueError, match=r"no part 'wikitext-2'. It has: wikitext-103-raw-v1, wikitext-2-raw-v1"):
        local_copy(hub_dataset("wikitext:wikitext-2"), tmp_path)


@pytest.mark.parametrize(
    ("name", "files", "train", "validation"),
    [
        ("wikitext", ["train-0.parquet", "validation-0.parquet", "test-0.parquet"], [0], [1]),
        ("wikitext", ["wikitext-2-raw-v1/train-0.parquet", "LICENSE.txt"], [0], []),  # the only part there is
        ("wikitext", ["wiki.train.txt", "wiki.valid.txt", "wiki.test.txt", "README.txt"], [0], [1]),
        ("tinystories", ["data/train-0.parquet", "data/train-1.parquet", "data/validation-0.parquet"], [0, 1], [2]),
        ("tinystories", ["train.jsonl", "valid.jsonl", "notes.txt", "dataset_infos.json"], [0], [1]),
        ("fineweb-edu", ["sample/10BT/000_00000.parquet", "sample/100BT/000_00000.parquet"], [0], []),
        ("fineweb-edu", ["000_00001.parquet", "000_00000.parquet"], [1, 0], []),
        ("openwebtext", ["plain_text/partial-train/0000.parquet", "plain_text/train/0001.parquet"], [0, 1], []),
        ("someone/things", ["default/train/0000.parquet", "default/dev/0000.parquet"], [0], [1]),
    ],
)
def test_copies_are_read_in_every_usual_layout(tmp_path, name, files, train, validation):
    touch(tmp_path, *files)
    splits = local_copy(hub_dataset(name), tmp_path)
    assert splits.train == tuple(tmp_path / files[i] for i in train)
    assert splits.validation == tuple(tmp_path / files[i] for i in validation)


def test_a_copy_without_a_train_split_is_said(tmp_path):
    assert local_copy(WIKITEXT, tmp_path) is None
    assert local_copy(WIKITEXT, tmp_path / "nowhere") is None
    touch(tmp_path, "README.md")
    assert local_copy(WIKITEXT, tmp_path) is None
    touch(tmp_path, "test-00000-of-00001.parquet", "validation-00000-of-00001.parquet")
    with pytest.raises(FileNotFoundError, match=r"no file of a train split, only test-00000.*add train-"):
        local_copy(WIKITEXT, tmp_path)


def test_a_download_fetches_the_parquet_of_one_part_and_serves_later_without_a_network(tmp_path, nowhere):
    names = ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001", "test-00000-of-00001")
    files = {f"{name}.parquet": parquet_bytes(tmp_path, name) for name in names}
    repository = {f"wikitext-103-raw-v1/{name}": body for name, body in files.items()}
    repository |= {"wikitext-2-raw-v1/train-0.parquet": b"another part", "README.md": b"words", "wikitext.py": b"1/0"}
    at = {"folder": tmp_path / "data/wikitext", "cache_dir": tmp_path / "cache"}
    with Hub("Salesforce/wikitext", {"main": repository}) as server:
        splits = download(WIKITEXT, endpoint=server.endpoint, **at)
    fetched = {path.split("/")[-1] for path in server.asked if "/resolve/" in path}
    assert fetched == set(files)  # no other part, and never a script
    for later in (splits, download(WIKITEXT, endpoint=nowhere, **at)):  # the second time from the cache
        assert contents(later.train) == list(files.values())[:2]
        assert contents(later.validation) == list(files.values())[2:3]
    splits.train[0].unlink()
    with pytest.raises(ConnectionError, match=r"nor \(whole\) in the Hugging Face cache"):  # never half of it
        download(WIKITEXT, endpoint=nowhere, **at)


def test_a_data_set_that_is_not_parquet_is_fetched_from_its_parquet_twin(tmp_path, nowhere):
    body = parquet_bytes(tmp_path, "a page of the web")
    revisions = {"main": {"openwebtext.py": b"1/0"}, CONVERTED: {"plain_text/partial-train/0000.parquet": body}}
    data, at = DATASETS["openwebtext"], {"folder": tmp_path / "data", "cache_dir": tmp_path / "cache"}
    with Hub(data.hub_id, revisions) as server:
        assert contents(download(data, endpoint=server.endpoint, **at).train) == [body]
    assert not any(path.endswith(".py") for path in server.asked)
    assert contents(download(data, endpoint=nowhere, **at).train) == [body]


def test_a_configuration_that_the_hub_does_not_have_is_said_with_those_it_has(tmp_path):
    revisions = {"main": {"data/train-0.parquet": b"x"}, CONVERTED: {"en/train/0000.parquet": b"x"}}
    at = {"folder": tmp_path / "data", "cache_dir": tmp_path / "cache"}
    with Hub("someone/things", revisions) as server:
        with pytest.raises(
            ValueError, match=r"has no part 'de'\. It has: data, en. Name one: --dataset someone/things:data"
        ):
            download(hub_dataset("someone/things:de"), endpoint=server.endpoint, **at)
        assert len(download(hub_dataset("someone/things:en"), endpoint=server.endpoint, **at).train) == 1
    two = {"main": {"a/train-0.parquet": b"x", "b/train-0.parquet": b"x"}}
    with Hub("someone/things", two) as server, pytest.raises(ValueError, match=r"has several parts\. It has: a, b"):
        download(hub_dataset("someone/things"), endpoint=server.endpoint, **at)


@pytest.mark.parametrize(
    ("revisions", "refuse", "error", "message"),
    [
        ({"main": {"train.csv": b"x"}}, None, ValueError, "no parquet files.*a script of the hub is never run"),
        ({}, (404, "RepoNotFound"), FileNotFoundError, "no public data set someone/things.*hf auth login"),
        ({}, (401, "RepoNotFound"), FileNotFoundError, "no public data set someone/things"),
        ({}, (403, "GatedRepo"), ConnectionError, "accept its terms there"),
        ({}, (500, ""), ConnectionError, "the hub cannot be reached .HfHubHTTPError"),
    ],
)
def test_what_the_hub_refuses_is_said(tmp_path, revisions, refuse, error, message):
    with Hub("someone/things", revisions, refuse) as server, pytest.raises(error, match=message):
        download(hub_dataset("someone/things"), tmp_path, endpoint=server.endpoint, cache_dir=tmp_path / "cache")


def test_a_download_that_breaks_off_goes_on_where_it_stopped(tmp_path):
    files = {f"train-0000{i}-of-00002.parquet": parquet_bytes(tmp_path, str(i)) for i in range(2)}
    at = {"folder": tmp_path, "cache_dir": tmp_path / "cache"}
    data = hub_dataset("someone/things")
    broken = Hub("someone/things", {"main": files}, cut=["train-00001-of-00002.parquet"])
    with broken as server, pytest.raises(ConnectionError, match=r"broke off.*run it again"):
        download(data, endpoint=server.endpoint, **at)
    with Hub("someone/things", {"main": files}) as server:
        assert contents(download(data, endpoint=server.endpoint, **at).train) == list(files.values())
    assert not any(path.endswith("train-00000-of-00002.parquet") for path in server.asked)


def test_without_a_network_and_a_copy_every_remedy_is_said(tmp_path, nowhere, monkeypatch):
    for offline, why in ((False, "ConnectError"), (True, "OfflineModeIsEnabled")):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        with pytest.raises(ConnectionError) as error:
            download(WIKITEXT, tmp_path / "data/wikitext", endpoint=nowhere, cache_dir=tmp_path / "cache")
        for part in (
            f"wikitext is not in {tmp_path}/data/wikitext/ nor (whole) in the Hugging Face cache",
            f"({why}: ",
            "connect this machine",
            "unset HF_HUB_OFFLINE",
            "wikitext-103-raw-v1/*.parquet from https://huggingface.co/datasets/Salesforce/wikitext",
            "--dataset FILE, --dataset python-docs or --dataset tales",
        ):
            assert part in str(error.value)


def test_a_name_that_no_hub_could_have_is_said(tmp_path, nowhere):
    with pytest.raises(ValueError, match="cannot be a data set of the Hugging Face hub"):
        download(hub_dataset("some..one/things--"), tmp_path, endpoint=nowhere, cache_dir=tmp_path / "cache")


def test_without_huggingface_hub_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install -r requirements-hub\.txt"):
        download(WIKITEXT, tmp_path)


def test_the_table_names_what_the_command_line_promises():
    assert set(hub.DATASETS) == {"wikitext", "openwebtext", "tinystories", "fineweb-edu"}
    assert all(name == data.name and data.hub_id.count("/") == 1 for name, data in hub.DATASETS.items())
