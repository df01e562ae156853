"""tap(name, tensor): a place where somebody may look at a value inside a function, or put another one there.

Hooks of torch see what goes in and out of a module. Queries, scores and weights live inside functions: there stands a
tap. Nobody listens as a rule, and then it is the tensor itself and nothing else, also in a compiled graph.
`GPT2Model/tracing.py` is the listener.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

Listener = Callable[..., Tensor]
_listener: Listener | None = None


def tap(name: str, tensor: Tensor, **where: slice) -> Tensor:
    """`tensor`, or what a listener puts in its place.

    Args:
        name: what the value is called in its module: "queries".
        tensor: the value; never changed in place.
        where: the part of a larger whole that it is, for a value that comes in tiles: rows=slice(0, 4).
    """
    return tensor if _listener is None else _listener(name, tensor, **where)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """For the time of a `with`, every tap calls `listener(name, tensor, **where)` and goes on with what it returns.

    One listener at a time, for the whole process: a forward pass in another thread would be heard too.

    Raises:
        RuntimeError: somebody listens already.
    """
    global _listener
    if _listener is not None:
        raise RuntimeError("somebody listens to the taps already: end that trace before the next one begins.")
    _listener = listener
    try:
        yield
    finally:
        _listener = None
