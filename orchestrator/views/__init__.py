"""Views: matplotlib figures of what was run."""
