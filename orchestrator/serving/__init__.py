"""Serving: many requests at once over one paged cache. Start with `block_manager.py`."""
