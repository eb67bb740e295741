"""Files into documents of token ids, a module for each format: `readers.FORMAT.read(path, …) -> Reading`."""

from potstill.data.readers import chat, hf, hub, jsonl, parquet, prompts, text, tokens
from potstill.data.readers.folders import files_of
from potstill.data.readers.reading import Document, Reading

__all__ = [
    "Document",
    "Reading",
    "chat",
    "files_of",
    "hf",
    "hub",
    "jsonl",
    "parquet",
    "prompts",
    "text",
    "tokens",
]
