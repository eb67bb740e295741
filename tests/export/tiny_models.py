"""Runs with a tiny student of each architecture, and tokenizers that split as llama.cpp's names promise."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers.tokenization_utils_base import generate_merges

from potstill.io.hashing import file_sha256
from potstill.models.portable import write_portable_config
from potstill.runs.run_dir import RunDir

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed; not run"
)
# llama.cpp's own expressions, as its source spells them.
CONTRACTED = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
EXPRESSIONS = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [rf"{CONTRACTED}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}"],
    "dbrx": [rf"{CONTRACTED}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}"],
    "qwen2": [rf"{CONTRACTED}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{REST}"],
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PHI_3 = ("</s>", "<|endoftext|>", "<s>")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
TEXT = [
    "def read(path):\n    return 1234 + 56\n",
    "the cat   sat on the mat 2024 1999",
    "x =  12\n\n\ny = 3",
] * 20
CONFIGS: dict[str, Any] = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "mistral": transformers.MistralConfig,
    "qwen3_moe": transformers.Qwen3MoeConfig,
    "gemma2": transformers.Gemma2Config,
    "gemma3": transformers.Gemma3TextConfig,
    "phi3": transformers.Phi3Config,
    "olmo2": transformers.Olmo2Config,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "gemma2": {
        "query_pre_attn_scalar": 16,
        "sliding_window": 40,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3": {
        "query_pre_attn_scalar": 16,
        "sliding_window": 40,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_theta": 5000.0, "rope_type": "linear", "factor": 4.0},
            "sliding_attention": {"rope_theta": 100.0, "rope_type": "default"},
        },
    },
    "phi3": {"pad_token_id": 0, "partial_rotary_factor": 0.5},
}
"""What differs from the options of all."""
KINDS = ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3", "phi3"]


def make_tokenizer(pre: str, adds_bos: bool = False) -> Any:
    inner = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(each), "isolated") for each in EXPRESSIONS[pre]),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(TEXT, trainer)
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{SPECIAL[1]} $A", special_tokens=[(SPECIAL[1], 1)]
        )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=SPECIAL[2], bos_token=SPECIAL[1], pad_token=SPECIAL[0]
    )
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_pieces(kind: str = "gemma") -> Any:
    """Pieces of SentencePiece, and bytes. Of Llama 2 and Phi-3 with a space in front; special tokens of Phi-3, but
    three, take the spaces behind with them.
    """
    space_in_front = kind != "gemma"
    pad, eos, bos = PHI_3 if kind == "phi-3" else ("<pad>", "<eos>", "<bos>")
    inner = Tokenizer(models.BPE())
    spaces = [normalizers.Prepend("\u2581")] if space_in_front else []
    inner.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", "\u2581")])
    inner.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=70, show_progress=False))
    learnt = sorted(inner.get_vocab(), key=inner.get_vocab().__getitem__)
    tokens = [pad, eos, bos, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *learnt]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = generate_merges(vocab, {token: -i for token, i in vocab.items()})
    inner.model = models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    inner.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 2)])
    inner.add_special_tokens([AddedToken(pad, rstrip=kind == "phi-3", normalized=False)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=eos, bos_token=bos, pad_token=pad, unk_token="<unk>"
    )


def make_model(kind: str = "llama", rows: int = 352, **changes: Any) -> Any:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "vocab_size": rows,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": [2, 0],
        "initializer_range": 0.3,
    }
    config = CONFIGS[kind](**options | OPTIONS.get(kind, {}) | changes)
    hf = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if name.endswith(("norm.weight", ".bias")):  # ones and zeros would hide a mix-up
                parameter.copy_(1.0 + 0.2 * torch.randn_like(parameter))
    return hf


def make_run(path: Path, hf: Any, tokenizer: Any) -> RunDir:
    """A finished run whose student is `hf`."""
    run = RunDir.create(path, recipe=b"", resolved="", corpus={})

    def save(place: Path) -> None:
        hf.save_pretrained(place)
        write_portable_config(place)
        tokenizer.save_pretrained(place)

    run.replace_student(save)
    output = {file.name: file_sha256(file) for file in sorted(run.student.iterdir()) if file.is_file()}
    run.write_receipt({"output": output, "teacher": {}, "student": {"name": "cut"}})
    run.set_status("finished")
    return run
