"""How many blocks of keys and values there is memory for."""

from numbers import Integral

from GPT2Model.free_memory import free_memory, mib

SHARE = 0.5  # of the free memory: the rest is for what a forward pass makes


def block_bytes(model, block_size: int) -> int:
    """Memory of one block: keys and values of `block_size` tokens in every layer."""
    attention, weight = model.blocks[0].attention, model.final_norm.weight
    return 2 * len(model.blocks) * block_size * attention.num_kv_heads * attention.head_dim * weight.element_size()


def affordable_blocks(model, block_size: int, max_running: int) -> int:
    """Blocks for `max_running` texts of full length, or as many as half of the free memory holds.

    Raises:
        ValueError: not even one text of full length fits.
    """
    of_one_text = -(-model.cfg["context_length"] // block_size)
    free, size = free_memory(model.final_norm.weight.device.type), block_bytes(model, block_size)
    blocks = min(of_one_text * max_running, int(free * SHARE) // size)
    if blocks < of_one_text:
        raise ValueError(
            f"one text of {model.cfg['context_length']} tokens needs {of_one_text} blocks of {mib(size)}, and "
            f"{mib(free)} are free: pass num_blocks for shorter texts, or use a smaller model."
        )
    return blocks


def check_sizes(model, *, num_blocks: int | None, block_size: int, max_running: int, max_batch_tokens: int) -> None:
    """Raise one ValueError with everything that is wrong with an engine's sizes."""
    if not hasattr(model, "cfg") or not hasattr(model, "blocks"):
        raise ValueError(f"the engine's first argument is the model, a GPTModel, got {type(model).__name__}.")
    sizes = {"block_size": block_size, "max_running": max_running, "max_batch_tokens": max_batch_tokens}
    if num_blocks is not None:
        sizes["num_blocks"] = num_blocks
    wrong = [
        f"{name} must be a whole number, 1 or more, got {name}={size!r}."
        for name, size in sizes.items()
        if not isinstance(size, Integral) or isinstance(size, bool) or size < 1
    ]
    if not wrong and max_running > max_batch_tokens:
        wrong.append(
            f"every running text reads a token in each step, so max_running may be max_batch_tokens at most, got "
            f"{max_running=}, {max_batch_tokens=}."
        )
    if not wrong and num_blocks is not None:
        needed, free = num_blocks * block_bytes(model, block_size), free_memory(model.final_norm.weight.device.type)
        if needed > free:
            wrong.append(f"num_blocks={num_blocks} blocks are {mib(needed)}, and {mib(free)} are free: take fewer.")
    if wrong:
        raise ValueError("the engine cannot be made:\n" + "\n".join(f"  - {problem}" for problem in wrong))
