"""Text sources and their tokenizers."""
