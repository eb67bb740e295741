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
from conftest import WORDS, demo_gguf, make_corpus, tiny_config
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from potstill import distill
from potstill.cli.main import main
from potstill.data.tokenizers import load_tokenizer
from potstill.data.trimmed_tokenizer import Trimmable
from potstill.workflows import trim as workflow

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
    settings = json.loads(inner.to_str())
    settings["model"]["vocab"]["Ġ<no byte of UTF-8>"] = settings["model"]["vocab"].pop(
        "ÿ"
    )  # as SmolLM2 has it
    inner = tokenizers.Tokenizer.from_str(json.dumps(settings))
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
    tiny_recipe: Recipe,
    teacher: Path,
    tmp_path: Path,
    corpus_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "small"
    record = trimmed(tiny_recipe(teacher=f"{{name: torch, model: {teacher}}}"), out, IDS)
    assert "40 of its 40 documents could be compared" in capsys.readouterr().err
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
    said = refused(capsys, tmp_path / "not there" / "small", recipe, "--ids", "200")
    assert not (tmp_path / "not there").exists()
    fewest = int(said.partition(" or more")[0].split()[-1])
    assert refused(capsys, out, recipe, "--ids", str(fewest - 1)).startswith("error: --ids: ")
    words = tokenizers.Tokenizer(models.WordLevel({"<eos>": 0, "<pad>": 1, "<bos>": 2, "the": 3}, "<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    plain = make_teacher(tmp_path / "words", words)
    said = refused(capsys, out, recipe, "--ids", "400", f"teacher={{name: torch, model: {plain}}}")
    assert "WordLevel" in said and "BPE" in said
    said = refused(capsys, out, recipe, "--ids", "400", "teacher={name: toy, vocab_size: 300}")
    assert "teacher.name" in said and "toy" in said
    characters = tokenizers.Tokenizer(models.BPE())
    characters.pre_tokenizer = pre_tokenizers.Whitespace()
    specials = ["<eos>", "<pad>", "<bos>"]
    characters.train_from_iterator(TEXTS, trainers.BpeTrainer(special_tokens=specials, show_progress=False))
    plain = make_teacher(tmp_path / "characters", characters)
    said = refused(capsys, out, recipe, "--ids", "400", f"teacher={{name: torch, model: {plain}}}")
    assert "no tokens for single bytes" in said
    (tmp_path / "ids.bin").write_bytes(bytes(range(250)) * 8)
    place = f"path: {tmp_path / 'ids.bin'}, dtype: uint16"
    corpus = f"corpus={{name: tokens, {place}, tokens_per_row: 32, heldout_rows: 4}}"
    assert "corpus.name: tokens" in refused(capsys, out, recipe, "--ids", "400", corpus)
    (tmp_path / "file").touch()
    assert "cannot be written" in refused(capsys, tmp_path / "file" / "small", recipe, "--ids", "400")
    assert not out.exists() and not [*tmp_path.glob("*small*")]
    for name in ("small.old", "small.new"):
        (tmp_path / name).mkdir()
    trimmed(Path(recipe), out, fewest)
    assert "exists already" in refused(capsys, out, recipe, "--ids", "400")
    assert {each.name for each in tmp_path.glob("*small*")} == {"small", "small.old", "small.new"}


def test_a_tokenizer_that_would_read_the_corpus_otherwise_is_refused(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it would without what its tokens are merged from."""
    monkeypatch.setattr(Trimmable, "_closed", lambda self, tokens: {*tokens})
    teacher = make_teacher(tmp_path / "teacher", byte_level())
    recipe = str(tiny_recipe(teacher=f"{{name: torch, model: {teacher}}}"))
    said = refused(capsys, tmp_path / "small", recipe, "--ids", "300")
    assert "documents of the corpus are tokenized differently" in said
    assert not [*tmp_path.glob("*small*")]


@pytest.mark.parametrize("kind", ["GPT2", "Bloom", "Mamba", "Phi"])
def test_other_families(kind: str, tiny_recipe: Recipe, tmp_path: Path) -> None:
    """With dropout; without packed rows; without attention; with a bias in the head."""
    teacher = make_teacher(tmp_path / "teacher", byte_level())
    config = transformers.AutoConfig.from_pretrained(teacher)
    ids = {
        name: getattr(config, name) for name in ("vocab_size", "eos_token_id", "pad_token_id", "bos_token_id")
    }
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4} | ids
    if kind in ("GPT2", "Bloom"):
        shape = {"n_embd" if kind == "GPT2" else "hidden_size": 32, "n_layer": 2, "n_head": 4} | ids
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**shape))
    model.save_pretrained(teacher)
    corpus = "corpus.packing=false"
    assert (
        main(
            [
                "trim",
                str(tiny_recipe()),
                f"teacher.model={teacher}",
                corpus,
                "--ids",
                "330",
                "--out",
                str(tmp_path / "small"),
            ]
        )
        == 0
    )
    kept = json.loads((tmp_path / "small" / "trimmed.json").read_text())["kept"]
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    ids_BT = torch.arange(20, 40)[None]
    expected = model.eval()(torch.tensor(kept)[ids_BT]).logits[..., kept]
    torch.testing.assert_close(found(ids_BT).logits, expected)


def test_weights_of_several_types_are_not_rounded(tiny_recipe: Recipe, tmp_path: Path) -> None:
    teacher, out = make_teacher(tmp_path / "teacher", byte_level()), tmp_path / "small"
    tensors = load_file(teacher / "model.safetensors")
    tensors = {name: each if "norm" in name else each.bfloat16() for name, each in tensors.items()}
    tensors["model.norm.weight"] += 1e-4
    save_file(tensors, teacher / "model.safetensors", {"format": "pt"})
    trimmed(tiny_recipe(teacher=f"{{name: torch, model: {teacher}}}"), out, IDS)
    assert torch.equal(
        load_file(out / "model.safetensors")["model.norm.weight"], tensors["model.norm.weight"]
    )


def test_tokens_that_the_model_has_no_row_for_are_left_out(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """As Transformers adds them to the tokenizer of a GGUF file, and as an added pad without a row."""
    teacher = make_teacher(tmp_path / "teacher", byte_level())
    rows = transformers.AutoConfig.from_pretrained(teacher).vocab_size
    tokenizer = transformers.AutoTokenizer.from_pretrained(teacher)
    tokenizer.add_tokens([f"<more {number}>" for number in range(rows - len(tokenizer) + 1)])
    tokenizer.add_special_tokens({"pad_token": "<no row>"})
    tokenizer.save_pretrained(teacher)
    trimmed(tiny_recipe(teacher=f"{{name: torch, model: {teacher}}}"), tmp_path / "small", 400)
    new = transformers.AutoTokenizer.from_pretrained(tmp_path / "small")
    assert new.pad_token is None and "<more 0>" in new.get_vocab()
    distill(tiny_recipe(teacher=f"{{name: torch, model: {tmp_path / 'small'}}}"), out=tmp_path / "run")


def test_what_the_tokenizer_itself_needs_stays(
    tiny_recipe: Recipe, tmp_path: Path, corpus_folder: Path
) -> None:
    """An ordinary token in the template, and one for what is unknown."""
    inner = byte_level()
    settings = json.loads(inner.to_str())
    rare = settings["model"]["merges"][-1]
    token = "".join(rare)
    settings["model"]["unk_token"] = "".join(settings["model"]["merges"][-2])
    settings["post_processor"]["special_tokens"]["<bos>"] = {
        "id": "<bos>",
        "ids": [settings["model"]["vocab"][token]],
        "tokens": [token],
    }
    teacher = make_teacher(tmp_path / "teacher", tokenizers.Tokenizer.from_str(json.dumps(settings)))
    recipe = tiny_recipe(
        teacher=f"{{name: torch, model: {teacher}}}",
        corpus=f"{{name: text, path: {corpus_folder}, tokens_per_row: 32, heldout_rows: 4, bos: false}}",
    )
    kept = trimmed(recipe, tmp_path / "small", IDS)["kept"]
    own, new = (
        transformers.AutoTokenizer.from_pretrained(folder) for folder in (teacher, tmp_path / "small")
    )
    assert [kept[i] for i in new("the cat")["input_ids"]] == own("the cat")["input_ids"]


def test_a_prefix_inside_words_is_no_part_of_what_is_merged(tiny_recipe: Recipe, tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer(models.BPE(continuing_subword_prefix="##"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, continuing_subword_prefix="##")
    )
    inner.add_special_tokens(["<eos>", "<pad>", "<bos>"])
    teacher = make_teacher(tmp_path / "teacher", inner)
    trimmed(tiny_recipe(teacher=f"{{name: torch, model: {teacher}}}"), tmp_path / "small", 500)


def test_the_tokenizer_of_the_corpus_and_what_only_the_teacher_reads(
    tiny_recipe: Recipe, tmp_path: Path
) -> None:
    """A chat template that the corpus's tokenizer alone has, and hints for the teacher."""
    teacher = make_teacher(tmp_path / "teacher", byte_level())
    tokenizer = transformers.AutoTokenizer.from_pretrained(teacher)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    hint = "wonderful garden flowers said the wandering dogs"
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"the cat sat {n}", "hint": hint}) + "\n" for n in range(40))
    )
    recipe = tiny_recipe(
        corpus=f"{{name: prompts, path: {path}, tokens_per_row: 128, heldout_rows: 4, context: hint,"
        f" tokenizer: {tmp_path / 'tokenizer'}}}",
        teacher=f"{{name: torch, model: {teacher}}}",
        objective="{divergence: reverse_kl, chunk: 16}",
        rollouts="{max_new_tokens: 4}",
    )
    kept = trimmed(recipe, tmp_path / "small", IDS)["kept"]
    new = transformers.AutoTokenizer.from_pretrained(tmp_path / "small")
    assert new.chat_template == tokenizer.chat_template
    assert [kept[i] for i in new(hint)["input_ids"]] == tokenizer(hint)["input_ids"]


def test_the_real_tokenizer_of_a_gguf_file(tmp_path: Path) -> None:
    """SmolLM2's, which lacks 21 of the 256 bytes."""
    path = demo_gguf()
    if path is None:
        pytest.skip("real teacher: the demo extra is not installed; not run")
    own = load_tokenizer(path)
    used = {id_ for text in TEXTS for id_ in own(text)["input_ids"]}
    trimmable = Trimmable(own, 49152)
    kept = trimmable.kept_ids(used, 4000)
    new = trimmable.save(kept, tmp_path / "small")
    assert len(new) == len(kept) == 4000
    for text in TEXTS:
        assert [kept[i] for i in new(text)["input_ids"]] == own(text)["input_ids"]
    assert new.decode(new(OTHER_TEXT)["input_ids"]) == own.decode(own(OTHER_TEXT)["input_ids"]) == OTHER_TEXT


def test_a_corpus_that_cannot_be_compared_is_refused(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no decoded text has the tokens that were kept."""
    teacher = make_teacher(tmp_path / "teacher", byte_level())
    monkeypatch.setattr(workflow, "_texts", lambda tokenizer, streams: [["whatever wonderful flowers"]])
    recipe = str(tiny_recipe(teacher=f"{{name: torch, model: {teacher}}}"))
    said = refused(capsys, tmp_path / "small", recipe, "--ids", "330")
    assert "none of 1 documents of the corpus are comparable" in said
    assert not [*tmp_path.glob("*small*")]
