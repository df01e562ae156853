"""Tokenizer files in and out: the ids are those of transformers.AutoTokenizer; what would change them is refused."""

import json

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, pre_tokenizers, trainers

from GPT2Model.byte_level_bpe import CHARACTER_OF, AddedToken, ByteLevelBPE
from GPT2Model.tokenizer import GPT2Tokenizer, get_tokenizer
from GPT2Model.tokenizer_files import published, tokenizer_from_folder, tokenizer_texts

TEXTS = [
    "", " ", "Hello world", "  two  spaces ", "tabs\tand\r\n\n\nlines", "it's we'll I'd THEY'VE", "1234 5,6 x² Ⅷ",
    "Grüße aus Köln: Äpfel", "我爱自然语言处理。你好!", "שלום مرحبا हिन्दी ภาษาไทย",
    "e\u0301 é \U0001f642 \U0001f469\u200d\U0001f467\u200d\U0001f466", "\U0001f3f3\ufe0f\u200d\U0001f308",
    "\x00\x01\x7f\u00a0\u200b\ufeff",
    "<|endoftext|>", "a<|endoftext|>b <|endoftext|> c", "<|endoftext|><|endoftext|>", "<|endo<|endoftext|>ftext|>",
    "<|pad|>", "a flibber b", "unflibbered", "New York, New Yorker", "<|user|>Hi<|end|>", "now<|end|>", "a" * 300,
]  # fmt: skip
# What both know: letters that one of the two Unicode versions does not have yet are split by chance.
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs", "Cn"], max_codepoint=0x2FFFF), max_size=40)
MARKS = st.sampled_from(["<|endoftext|>", "<|pad|>", "flibber", " New York", "<|user|>", "'s", "  ", "\n", "<s>"])
MIXED = st.lists(st.one_of(ANY_TEXT, MARKS), max_size=8).map("".join)


def write(folder, texts: dict[str, str]):
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gpt2"), tokenizer_texts(get_tokenizer(), 1024))


@pytest.fixture(scope="module")
def fine_tuned(gpt2_folder, tmp_path_factory):
    """What transformers writes of a GPT-2 tokenizer with added tokens, special and plain."""
    theirs = transformers.AutoTokenizer.from_pretrained(gpt2_folder)
    theirs.add_special_tokens({"pad_token": "<|pad|>", "additional_special_tokens": ["<|user|>", "<|end|>"]})
    theirs.add_tokens(["flibber", "New York", "New", "w<|end"])
    folder = tmp_path_factory.mktemp("fine_tuned")
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A vocabulary of 600 that the library tokenizers learned, its special tokens in front."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    with open(__file__, encoding="utf-8") as text:
        tokenizer.train_from_iterator(text, trainer)
    folder = tmp_path_factory.mktemp("own")
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.save_pretrained(folder)
    return folder


def ids_of(theirs, text: str) -> list[int]:
    return theirs(text, verbose=False)["input_ids"]


KINDS = ["gpt2_folder", "fine_tuned", "own"]


@pytest.fixture(scope="module", params=KINDS)
def both(request):
    folder = request.getfixturevalue(request.param)
    return tokenizer_from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_the_ids_are_those_of_transformers(text, both):
    ours, theirs = both
    assert ours.encode(text) == ids_of(theirs, text)
    assert ours.decode(ours.encode(text)) == text


@settings(max_examples=150, deadline=None)
@given(text=MIXED)
def test_the_ids_of_any_text_are_those_of_transformers(both, text):
    ours, theirs = both
    ids = ours.encode(text)
    assert ids == ids_of(theirs, text)
    assert ours.decode(ids) == text
    assert all(0 <= i < ours.vocab_size for i in ids)


def test_gpt2_s_own_files_give_gpt2_s_own_tokenizer(gpt2_folder, fine_tuned, own):
    assert tokenizer_from_folder(gpt2_folder) is get_tokenizer()
    tuned = tokenizer_from_folder(fine_tuned)
    assert isinstance(tuned, ByteLevelBPE)
    assert (tuned.vocab_size, tuned.end_of_text) == (50263, 50256)
    small = tokenizer_from_folder(str(own))
    assert (small.vocab_size, small.end_of_text) == (600, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_opens_in_transformers_and_here_with_the_same_ids(kind, request, tmp_path):
    folder = request.getfixturevalue(kind)
    ours = tokenizer_from_folder(folder)
    again = write(tmp_path / "again", tokenizer_texts(ours, 77))
    theirs, before = (transformers.AutoTokenizer.from_pretrained(place) for place in (again, folder))
    assert isinstance(theirs, transformers.GPT2Tokenizer)
    assert theirs.model_max_length == 77
    assert theirs.eos_token_id == ours.end_of_text == before.eos_token_id
    ours_again = tokenizer_from_folder(again)
    for text in TEXTS:
        assert ids_of(theirs, text) == ids_of(before, text) == ours_again.encode(text)
    (again / "tokenizer.json").unlink()  # older programs read the other files
    if kind != "fine_tuned":  # there the added tokens are in tokenizer.json alone
        plain = tokenizer_from_folder(again)
        assert isinstance(plain, GPT2Tokenizer if kind == "gpt2_folder" else ByteLevelBPE)
        assert all(plain.encode(text) == ours.encode(text) for text in TEXTS if "<s>" not in text)


def test_vocab_json_and_merges_txt_alone_will_do_as_openai_published_them(gpt2_folder, tmp_path):
    names = ("vocab.json", "merges.txt")
    folder = write(tmp_path, {name: (gpt2_folder / name).read_text("utf-8") for name in names})
    assert tokenizer_from_folder(folder) is get_tokenizer()
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert all(get_tokenizer().encode(text) == ids_of(theirs, text) for text in TEXTS)


def test_added_tokens_of_older_folders_are_honoured(gpt2_folder, tmp_path):
    """added_tokens.json, and added_tokens_decoder in tokenizer_config.json."""
    names = ("vocab.json", "merges.txt")
    folder = write(tmp_path, {name: (gpt2_folder / name).read_text("utf-8") for name in names})
    write(folder, {"added_tokens.json": '{"<|pad|>": 50257}', "special_tokens_map.json": '{"pad_token": "<|pad|>"}'})
    assert tokenizer_from_folder(folder).encode("a<|pad|>") == [64, 50257]
    user = {"content": "<|user|>", "special": True, "normalized": False, "lstrip": False}
    config = {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": {"50258": user}}
    write(folder, {"tokenizer_config.json": json.dumps(config)})
    assert tokenizer_from_folder(folder).encode("<|user|>a<|pad|>") == [50258, 64, 50257]


def changed(folder, tmp_path, config=None, whole=None, model=None):
    """A copy with changed fields of tokenizer_config.json, of tokenizer.json, or of its model."""
    texts = {path.name: path.read_text("utf-8") for path in folder.iterdir()}
    for name, changes in (("tokenizer_config.json", config), ("tokenizer.json", whole)):
        texts[name] = json.dumps({**json.loads(texts[name]), **(changes or {})})
    if model:
        content = json.loads(texts["tokenizer.json"])
        content["model"] |= model
        texts["tokenizer.json"] = json.dumps(content)
    return write(tmp_path / "changed", texts)


SPLIT = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
AROUND = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
          {"Sequence": {"id": "A", "type_id": 0}}], "pair": [], "special_tokens": {}}  # fmt: skip
STRIPS = [{"id": 0, "content": "<s>", "single_word": False, "lstrip": True, "rstrip": False, "normalized": False,
           "special": True}]  # fmt: skip
REFUSED = {
    "add_bos_token = True": {"config": {"add_bos_token": True}},
    "add_prefix_space = True": {"config": {"add_prefix_space": True}},
    "tokenizer_class = 'LlamaTokenizer'": {"config": {"tokenizer_class": "LlamaTokenizer"}},
    "pad_token '[PAD]' has no id": {"config": {"pad_token": "[PAD]"}},
    "dropout = 0.1": {"model": {"dropout": 0.1}},
    "type = 'Unigram'": {"model": {"type": "Unigram"}},
    "byte_fallback = True": {"model": {"byte_fallback": True}},
    "ignore_merges = True": {"model": {"ignore_merges": True}},
    "end_of_word_suffix = '</w>'": {"model": {"end_of_word_suffix": "</w>"}},
    "a normalizer, NFC": {"whole": {"normalizer": {"type": "NFC"}}},
    "text is split by": {"whole": {"pre_tokenizer": SPLIT}},
    "puts tokens around the text": {"whole": {"post_processor": AROUND}},
    "the added token '<s>' has lstrip": {"whole": {"added_tokens": STRIPS}},
    "has two ids: 0 and 7": {"config": {"added_tokens_decoder": {"7": {"content": "<s>"}}}},
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_would_change_the_ids_is_refused_by_name(said, own, tmp_path):
    with pytest.raises(ValueError, match="cannot be honoured") as caught:
        tokenizer_from_folder(changed(own, tmp_path, **REFUSED[said]))
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2


def test_everything_is_said_at_once(own, tmp_path):
    folder = changed(own, tmp_path, {"add_bos_token": True}, {"normalizer": {"type": "NFC"}}, {"dropout": 0.5})
    with pytest.raises(ValueError, match=r"(?s)add_bos_token.*dropout.*normalizer"):
        tokenizer_from_folder(folder)


def test_damaged_and_missing_files_are_said_in_a_line(own, gpt2_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer files: tokenizer\.json, or vocab\.json and merges"):
        tokenizer_from_folder(tmp_path)
    texts = {"vocab.json": (gpt2_folder / "vocab.json").read_text("utf-8"), "merges.txt": "a b c\n"}
    for name, text in (("merges.txt", "a b c\n"), ("merges.txt", "xyz zyx\n"), ("vocab.json", '{"a": 0}'),
                       ("vocab.json", '{"a": '), ("vocab.json", "[1]"), ("vocab.json", '{"a": "b"}')):  # fmt: skip
        folder = write(tmp_path / "broken", {**texts, "merges.txt": "Ġ t\n", name: text})
        with pytest.raises(ValueError, match=r"damaged|no byte-level BPE|not valid JSON|JSON object"):
            tokenizer_from_folder(folder)
    (folder / "vocab.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        tokenizer_from_folder(folder)


def test_what_is_no_byte_level_bpe_is_refused_with_everything_that_is_wrong():
    vocab = {character: byte for byte, character in CHARACTER_OF.items()}
    assert ByteLevelBPE(vocab, []).encode("é") == list("é".encode())
    broken = {**{c: i for c, i in vocab.items() if c not in "aé"}, "bc": 3, "<s>": 9000}
    said = r"(?s)lacks 2 of the 256 single bytes.*1 merges are of tokens.*'b', 'x'.*1 ids stand for two tokens"
    with pytest.raises(ValueError, match=said + r".*another id in the vocabulary: <s>"):
        ByteLevelBPE(broken, [("b", "c"), ("b", "x")], [AddedToken("<s>", 9001)])


def test_only_pairs_of_the_list_are_merged_in_its_order():
    """What tells it from tiktoken, which would merge any two tokens whose sum is one: here a and bc."""
    vocab = {character: byte for byte, character in CHARACTER_OF.items()} | {"bc": 256, "ab": 257, "abc": 258}
    merges = [("b", "c"), ("a", "b"), ("ab", "c")]
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ours = ByteLevelBPE(vocab, merges)
    for text in ("abc", "ab", "bcbc", "aabbcc", "abab", "cab abcab"):
        assert ours.encode(text) == theirs.encode(text).ids
    assert ours.encode("abc") == [97, 256]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_list_of_merges_gives_the_ids_of_the_library(data):
    """Not only those that training makes, in which a pair always comes behind its parts."""
    vocab, merges = {character: byte for byte, character in CHARACTER_OF.items()}, []
    for _ in range(data.draw(st.integers(0, 12))):
        tokens = st.sampled_from([token for token in vocab if set(token) <= set("abc")])
        pair = (data.draw(tokens), data.draw(tokens))
        if "".join(pair) not in vocab:
            vocab["".join(pair)] = len(vocab)
            merges.append(pair)
    merges = data.draw(st.permutations(merges))
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = data.draw(st.text("abc ", max_size=30))
    assert ByteLevelBPE(vocab, merges).encode(text) == theirs.encode(text).ids


def test_a_word_of_a_hundred_thousand_letters_is_no_matter(own):
    ours, theirs = tokenizer_from_folder(own), transformers.AutoTokenizer.from_pretrained(own)
    text = "abcde" * 20_000  # steps of its square would take minutes
    assert ours.encode(text) == ids_of(theirs, text)


def test_wrong_input_is_refused_as_gpt2_s_tokenizer_refuses_it(own):
    ours = tokenizer_from_folder(own)
    with pytest.raises(TypeError):
        ours.encode(b"a")
    with pytest.raises(ValueError, match=r"no token has the id 600; they are in 0\.\.599"):
        ours.decode([5, 600])
    with pytest.raises(ValueError, match="ids of one text"):
        ours.decode([[5]])
    assert ours.decode(ours.encode("Ж")[:1]) == "\ufffd"


def test_a_tokenizer_that_has_no_such_files_is_refused_by_name(monkeypatch):
    with pytest.raises(ValueError, match="the tokenizer 'object' has no files of this kind"):
        tokenizer_texts(object(), 24)
    assert published()[0]["<|endoftext|>"] == 50256
