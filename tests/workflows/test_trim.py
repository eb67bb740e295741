"""`potstill trim`: fewer tokens, the same rows of the corpus, the same logits, and any other text still written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from conftest import WORDS, make_corpus, tiny_config
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from potstill import distill
from potstill.cli.main import main
from potstill.data import trimmed_tokenizer

Recipe = Callable[..., Path]
OTHER_TEXT = "Zebras quickly xylophoned: 7,519 żółte €uro, naïve 漢字 🐈 \t\n"
TEXTS = [" ".join(WORDS[first:]) for first in range(len(WORDS))] + [
    "once upon a time some houses of red bricks sang in a garden of wonderful flowers, said the wandering dogs",
    "whatever wanders there, a thousand garden flowers and wonderful bricks are never lost on any time",
]


def byte_level() -> tokenizers.Tokenizer:
    """As GPT-2, Llama 3, Qwen and SmolLM have it, with a BOS that a template puts before each text."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(TEXTS, trainer)
    inner.add_special_tokens(["<eos>", "<pad>", "<bos>"])  # behind all others, where ids change
    bos = ("<bos>", inner.token_to_id("<bos>"))
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    return inner


def with_byte_fallback() -> tokenizers.Tokenizer:
    """As Llama 2 and Gemma have it: pieces of characters, and <0x00> to <0xFF> for those that are none."""
    specials = ["<unk>", "<eos>", "<pad>", "<bos>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=500, special_tokens=specials, show_progress=False)
    )
    settings = json.loads(trained.to_str())
    known = settings["model"]["vocab"]
    merges = [
        (token[:cut], token[cut:])  # all of its pairs, as they are converted from sentencepiece
        for token in known
        for cut in range(1, len(token))
        if token not in specials and {token[:cut], token[cut:]} <= known.keys()
    ]
    merges.sort(key=lambda pair: known["".join(pair)])
    inner = tokenizers.Tokenizer(
        models.BPE(vocab=known, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    inner.add_special_tokens(specials[:4])
    return inner


IDS = 360
KINDS = {"byte-level": byte_level, "byte fallback": with_byte_fallback}


@pytest.fixture(params=KINDS)
def teacher(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_teacher(tmp_path / "teacher", KINDS[request.param]())


def make_teacher(folder: Path, inner: tokenizers.Tokenizer, **changes: Any) -> Path:
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", bos_token="<bos>"
    )
    tokenizer.save_pretrained(folder)
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<{name}>") for name in ("eos", "pad", "bos")}
    torch.manual_seed(0)
    config = tiny_config(vocab_size=len(tokenizer) + 12, **ids | changes)  # a padded end
    model = transformers.AutoModelForCausalLM.from_config(config)
    last = max(len(tokenizer) - 5, 0)  # in one of both an ordinary token, of a rare pair
    model.generation_config.eos_token_id = [ids["eos_token_id"], ids["pad_token_id"], last]
    model.generation_config.suppress_tokens = [
        *range(len(tokenizer), len(tokenizer) + 12),
        3,
        ids["pad_token_id"],
    ]
    model.generation_config.bad_words_ids = [[ids["pad_token_id"], 3], [len(tokenizer) - 6]]
    model.save_pretrained(folder)
    return folder


def trimmed(recipe: Path, out: Path, ids: int) -> dict[str, Any]:
    assert main(["trim", str(recipe), "--ids", str(ids), "--out", str(out)]) == 0
    record: dict[str, Any] = json.loads((out / "trimmed.json").read_text())
    return record


def test_the_same_rows_and_logits_with_fewer_ids(
    tiny_recipe: Recipe, teacher: Path, tmp_path: Path, corpus_folder: Path
) -> None:
    out = tmp_path / "small"
    record = trimmed(tiny_recipe(teacher=f"{{name: torch, model: {teacher}}}"), out, IDS)
    own, new = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (teacher, out))
    kept = record["kept"]
    assert record["ids"] == {"before": len(own) + 12, "after": len(kept)}
    assert len(new) == len(kept) <= IDS < len(own)
    assert new.convert_ids_to_tokens(range(len(new))) == own.convert_ids_to_tokens(kept)
    for file in corpus_folder.iterdir():
        assert [kept[i] for i in new(file.read_text())["input_ids"]] == own(file.read_text())["input_ids"]
    assert new.decode(new(OTHER_TEXT, add_special_tokens=False)["input_ids"]) == own.decode(
        own(OTHER_TEXT, add_special_tokens=False)["input_ids"]
    )
    old_model, new_model = (transformers.AutoModelForCausalLM.from_pretrained(f) for f in (teacher, out))
    ids = torch.randint(len(kept), (1, 20), generator=torch.Generator().manual_seed(1))
    expected = old_model(torch.tensor(kept)[ids]).logits[..., kept]
    torch.testing.assert_close(new_model(ids).logits, expected)
    assert new_model.lm_head.weight is new_model.model.embed_tokens.weight
    assert new_model.num_parameters() == record["weights"]["after"]
    for name in ("eos", "pad", "bos"):
        assert kept[getattr(new_model.config, f"{name}_token_id")] == getattr(
            old_model.config, f"{name}_token_id"
        )
        assert kept[getattr(new, f"{name}_token_id")] == getattr(own, f"{name}_token_id")
    assert [
        kept[i] for i in new_model.generation_config.eos_token_id
    ] == old_model.generation_config.eos_token_id


def test_a_head_of_its_own_and_its_type_stay(tiny_recipe: Recipe, tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher", byte_level(), tie_word_embeddings=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.bfloat16)
    model.save_pretrained(teacher)
    out = tmp_path / "small"
    kept = trimmed(tiny_recipe(teacher=f"{{name: torch, model: {teacher}}}"), out, IDS)["kept"]
    found = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.lm_head.weight, model.lm_head.weight[kept])
    assert torch.equal(found.model.embed_tokens.weight, model.model.embed_tokens.weight[kept])


def test_a_student_of_it_is_trained(tiny_recipe: Recipe, teacher: Path, tmp_path: Path) -> None:
    trimmed(tiny_recipe(teacher=f"{{name: torch, model: {teacher}}}"), tmp_path / "small", IDS)
    run = distill(tiny_recipe(teacher=f"{{name: torch, model: {tmp_path / 'small'}}}"), out=tmp_path / "run")
    assert run.status()["state"] == "finished"
    student = transformers.AutoModelForCausalLM.from_pretrained(run.student)
    assert student.config.vocab_size <= IDS


def test_a_mix_of_corpora_is_read_as_before(tiny_recipe: Recipe, tmp_path: Path, corpus_folder: Path) -> None:
    other = make_corpus(tmp_path / "other", documents=30, words=25)
    teacher = make_teacher(tmp_path / "teacher", byte_level())
    sources = ", ".join(
        f"{{source: s{weight}, name: text, path: {path}, weight: {weight}}}"
        for path, weight in ((corpus_folder, 3), (other, 1))
    )
    recipe = tiny_recipe(
        corpus=f"{{name: mix, tokens_per_row: 32, heldout_rows: 4, sources: [{sources}]}}",
        teacher=f"{{name: torch, model: {teacher}}}",
    )
    assert trimmed(recipe, tmp_path / "small", IDS)["tokens_of_the_corpus"] < IDS


def refused(capsys: pytest.CaptureFixture[str], out: Path, *words: str) -> str:
    assert main(["trim", *words, "--out", str(out)]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_what_cannot_be_trimmed_is_one_line_and_leaves_nothing(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, out = make_teacher(tmp_path / "teacher", byte_level()), tmp_path / "small"
    recipe = str(tiny_recipe(teacher=f"{{name: torch, model: {teacher}}}"))
    said = refused(capsys, out, recipe, "--ids", "200")
    fewest = int(said.partition(" or more")[0].split()[-1])
    assert refused(capsys, out, recipe, "--ids", str(fewest - 1)).startswith("error: --ids: ")
    words = tokenizers.Tokenizer(models.WordLevel({"<eos>": 0, "<pad>": 1, "<bos>": 2, "the": 3}, "<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    plain = make_teacher(tmp_path / "words", words)
    said = refused(capsys, out, recipe, "--ids", "400", f"teacher={{name: torch, model: {plain}}}")
    assert "WordLevel" in said and "BPE" in said
    said = refused(capsys, out, recipe, "--ids", "400", "teacher={name: toy, vocab_size: 300}")
    assert "teacher.name" in said and "toy" in said
    assert not out.exists() and not list(tmp_path.glob("small*"))
    trimmed(Path(recipe), out, fewest)
    assert "exists already" in refused(capsys, out, recipe, "--ids", "400")


def test_a_tokenizer_that_would_read_the_corpus_otherwise_is_refused(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it would without what its tokens are merged from."""
    monkeypatch.setattr(trimmed_tokenizer, "_closed", lambda tokens, made_of: {*tokens})
    teacher = make_teacher(tmp_path / "teacher", byte_level())
    recipe = str(tiny_recipe(teacher=f"{{name: torch, model: {teacher}}}"))
    said = refused(capsys, tmp_path / "small", recipe, "--ids", "300")
    assert "reads" in said and "documents of the corpus otherwise" in said
    assert not list(tmp_path.glob("small*"))
