"""When may one block of the paged cache serve two sequences? When every token up to the block's end is the same.

From the second layer on, a key or a value depends on all tokens before it, and its position on how many there are. So
equal tokens *in* a block are not enough: the whole prefix must be equal. A hash chained through the blocks finds
candidates in one look-up each (vLLM's "automatic prefix caching"); the tokens themselves decide.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, eq=False)  # compared by `equals`, which a long chain does not send into deep recursion
class Prefix:
    """All tokens from the first one to the end of a full block.

    Attributes:
        hash: of the parent's hash and the tokens. It finds a candidate; it proves nothing.
        parent: the prefix that ends one block earlier; None: this is the first block. An object, and not the number of
            a block: a block that was evicted and filled anew keeps its number, and would pass for the old one.
        tokens: those of this block.
    """

    hash: int
    parent: "Prefix | None"
    tokens: tuple[int, ...]

    def equals(self, other: "Prefix") -> bool:
        """Token by token, down the whole chain; it is done where both chains run into the same object."""
        one, two = self, other
        while one is not two:
            if one is None or two is None or one.tokens != two.tokens:
                return False
            one, two = one.parent, two.parent
        return True


def chained_hash(parent: int, tokens: tuple[int, ...]) -> int:
    """The hash of a prefix, from the hash of the one before it (0: none) and the tokens of its last block."""
    return hash((parent, tokens))


def extended(parent: Prefix | None, tokens: Sequence[int], hash_function: Callable) -> Prefix:
    """The prefix that is one full block longer than `parent`."""
    tokens = tuple(tokens)
    return Prefix(hash_function(parent.hash if parent else 0, tokens), parent, tokens)
