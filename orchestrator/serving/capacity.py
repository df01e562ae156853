"""How many blocks of keys and values there is memory for."""

from orchestrator.evaluation.memory_guard import free_memory, mib

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
