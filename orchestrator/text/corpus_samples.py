"""The corpora of the notebooks and the main job, read by the one training loop.

They count in batches, and hold their validation split ready; `Samples` count in samples, and cut one of any size.
"""

from torch import Tensor

from orchestrator.text.samples import Batch


class CorpusSamples:
    """A corpus of `corpora.py` (or anything with its `batch` and `validation`) as `Samples`.

    Args:
        corpus: `batch(index, batch_size)` gives (inputs, targets), `validation` is a list of such pairs.
    """

    per_epoch = None

    def __init__(self, corpus):
        self.corpus = corpus
        self.name, self.floor = getattr(corpus, "name", "corpus"), getattr(corpus, "floor", None)
        self.tokenizer = getattr(corpus, "tokenizer", None)

    def batch(self, first: int, count: int) -> Batch:
        """Samples first .. first + count - 1: the corpus's batch number first / count."""
        return Batch(*self.corpus.batch(first // count, count), None)

    def validation(self, tokens: int, batch_size: int = 0) -> list[Batch]:
        """All that the corpus holds out, however much that is."""
        return [Batch(*pair, None) for pair in self.corpus.validation]

    def prompt(self) -> Tensor:
        return self.corpus.prompt()


def as_samples(samples_or_corpus):
    """What the loop reads, from either."""
    return samples_or_corpus if hasattr(samples_or_corpus, "per_epoch") else CorpusSamples(samples_or_corpus)
