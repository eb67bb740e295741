"""Completions: greedy ones are Transformers' own token for token, sampled ones follow the softmax, and how a
row ends is what happened.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from conftest import make_model, make_tokenizer
from scripted import EOS, PAD, TOKENIZER, ids_of, scripted
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from potstill.models.causal_lm import CausalLM
from potstill.models.generate import (
    InferenceFailed,
    Request,
    complete,
    context_length,
    describe_settings,
    make_settings,
)
from potstill.models.load import load_causal_lm

PROMPTS = [
    "def f(x):",
    "a",
    "The cat sat on the mat and",
    "   return",
    "é",
    "print(",
    "0 1 2 3 4 5 6 7 8 9 10 11 12",
]


def never(text: str) -> bool:
    return False


def requests_of(prompts: list[str], should_stop: Callable[[str], bool] = never) -> list[Request]:
    return [Request(f"{number}", ids_of(prompt), should_stop) for number, prompt in enumerate(prompts)]


def settings_of(
    model: CausalLM, tokens: int = 24, temperature: float = 0.0, top_p: float = 1.0, **more: Any
) -> Any:
    return make_settings(
        model,
        more.pop("tokenizer", TOKENIZER),
        max_new_tokens=tokens,
        temperature=temperature,
        top_p=top_p,
        **more,
    )


def texts(model: CausalLM, prompts: list[str], seed: int = 0, **options: Any) -> list[str]:
    return [
        c.text for c in complete(model, TOKENIZER, settings_of(model, **options), requests_of(prompts), seed)
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    return load_causal_lm(make_model(tmp_path_factory.mktemp("generation") / "llama", seed=3))


def other(kind: str) -> Any:
    small = {"vocab_size": 258, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
    if kind == "gpt2":  # positions are learned, so that a row's own must be given
        return transformers.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.3, **small
        )
    small |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 2, "initializer_range": 0.3, "max_position_embeddings": 256}
    if kind == "qwen2":
        return transformers.Qwen2Config(**small)
    return transformers.MistralConfig(sliding_window=16, **small)


@pytest.mark.parametrize("kind", ["llama", "padded", "gpt2", "qwen2", "mistral"])
def test_greedy_tokens_are_those_of_transformers_row_by_row(kind: str, tmp_path: Path) -> None:
    """In one batch here, one by one there; `padded` has 40 ids that mean nothing."""
    if kind in ("llama", "padded"):
        model = load_causal_lm(
            make_model(tmp_path / "model", seed=5, vocab_size=298 if kind == "padded" else 258)
        )
    else:
        torch.manual_seed(1)
        transformers.AutoModelForCausalLM.from_config(other(kind)).save_pretrained(tmp_path / "model")
        model = load_causal_lm(tmp_path / "model")
    model.mask_from(258)
    wanted = []
    for prompt in PROMPTS:
        ids = torch.tensor([ids_of(prompt)])
        new = model.hf.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=48)[
            0
        ]
        wanted.append(new[ids.shape[1] :].tolist())
    # Bytes that are no text are all shown alike, so that ids are compared.
    new_ids: dict[str, list[int]] = {}
    found = complete(model, Recorder(new_ids), settings_of(model, tokens=48), requests_of(PROMPTS))
    for prompt, completion, ids in zip(PROMPTS, found, wanted, strict=True):
        assert new_ids.get(prompt, []) == [i for i in ids if i != EOS]
        assert (completion.finish == "eos") == (EOS in ids)
        assert completion.tokens == len([i for i in ids if i != EOS])
    assert len({tuple(ids) for ids in wanted}) > 3


class Recorder:
    """A tokenizer that keeps, of each prompt, the ids that were last decoded after it."""

    eos_token_id, pad_token_id = EOS, PAD

    def __init__(self, new_ids: dict[str, list[int]]) -> None:
        self.new_ids = new_ids
        self.prompts = {tuple(ids_of(prompt)[-8:]): prompt for prompt in PROMPTS}

    def decode(self, ids: list[int], **options: Any) -> str:
        for before, prompt in self.prompts.items():
            if tuple(ids[: len(before)]) == before and len(ids) > len(before):
                self.new_ids[prompt] = ids[len(before) :]
        text: str = TOKENIZER.decode(ids, **options)
        return text


def test_an_id_that_means_nothing_is_never_written(tmp_path: Path) -> None:
    """The padded id has by far the largest logit everywhere."""
    model = load_causal_lm(make_model(tmp_path / "model", seed=5, vocab_size=298, tie_word_embeddings=False))
    with torch.no_grad():
        model.hf.lm_head.weight[270] = 50 * model.hf.lm_head.weight[97]
        model.hf.lm_head.weight[271] = -50 * model.hf.lm_head.weight[97]
    model.mask_from(258)
    for options in ({}, {"temperature": 1.0}):
        taken: dict[str, list[int]] = {}
        complete(model, Recorder(taken), settings_of(model, **options), requests_of(PROMPTS))
        assert taken and all(i < 258 for ids in taken.values() for i in ids)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_p": 0.9}])
def test_rows_of_unequal_lengths_answer_as_each_would_alone(options: dict[str, Any], tiny: CausalLM) -> None:
    together = complete(tiny, TOKENIZER, settings_of(tiny, **options), requests_of(PROMPTS))
    alone = [
        complete(tiny, TOKENIZER, settings_of(tiny, **options), [request])[0]
        for request in requests_of(PROMPTS)
    ]
    assert [replace(each, logp=0.0) for each in together] == [replace(each, logp=0.0) for each in alone]
    assert [each.logp for each in together] == pytest.approx([each.logp for each in alone], rel=1e-4)


def test_a_row_that_ended_changes_nothing_for_the_others(tiny: CausalLM) -> None:
    whole = texts(tiny, PROMPTS)
    for early in range(0, len(PROMPTS), 3):
        requests = requests_of(PROMPTS)
        requests[early] = Request(requests[early].name, requests[early].prompt_ids, lambda text: True)
        found = complete(tiny, TOKENIZER, settings_of(tiny), requests)
        assert (found[early].finish, found[early].tokens) == ("stop", 1)
        assert [c.text for i, c in enumerate(found) if i != early] == [
            t for i, t in enumerate(whole) if i != early
        ]


def test_a_sample_depends_on_its_name_and_the_seed_alone(tiny: CausalLM) -> None:
    settings = settings_of(tiny, temperature=1.0)
    requests = requests_of(PROMPTS)
    first = [c.text for c in complete(tiny, TOKENIZER, settings, requests, seed=4)]
    torch.manual_seed(99)
    backwards = [c.text for c in complete(tiny, TOKENIZER, settings, requests[::-1], seed=4)]
    assert backwards[::-1] == first
    assert [c.text for c in complete(tiny, TOKENIZER, settings, requests, seed=5)] != first
    twice = [
        Request(name, ids_of("The cat"), never) for name in ("HumanEval/0 sample 0", "HumanEval/0 sample 1")
    ]
    one, two = complete(tiny, TOKENIZER, settings, twice, seed=4)
    assert one.text != two.text


def test_sampling_leaves_the_generators_of_torch_alone(tiny: CausalLM) -> None:
    before = torch.get_rng_state()
    texts(tiny, PROMPTS, temperature=1.0)
    assert torch.equal(before, torch.get_rng_state())


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> tuple[float, int]:
    """Cells of fewer than five are taken together."""
    order = expected.argsort(descending=True)
    counts, expected = counts[order].double(), expected[order].double()
    large = int((expected >= 5).sum())
    cells = [(float(c), float(e)) for c, e in zip(counts[:large], expected[:large], strict=True)]
    if float(expected[large:].sum()) > 1:
        cells.append((float(counts[large:].sum()), float(expected[large:].sum())))
    return sum((c - e) ** 2 / e for c, e in cells), len(cells) - 1


def by_hand(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """The distribution in plain float64: the smallest set of the likeliest ids that holds `top_p`."""
    p = (logits.double() / temperature).softmax(-1)
    values, order = p.sort(descending=True)
    kept = (values.cumsum(0) - values) < top_p
    return torch.zeros_like(p).index_put((order[kept],), values[kept]) / values[kept].sum()


def first_tokens(model: CausalLM, number: int, **options: Any) -> torch.Tensor:
    """How often each id was drawn first, in `number` samples of one prompt."""
    counts = torch.zeros(258)

    class Counter(Recorder):
        def decode(self, ids: list[int], **options: Any) -> str:
            if len(ids) == len(ids_of("The cat")) + 1:
                counts[ids[-1]] += 1
            return super().decode(ids, **options)

    requests = [Request(f"sample {i}", ids_of("The cat"), never) for i in range(number)]
    found = complete(model, Counter({}), settings_of(model, tokens=1, **options), requests)
    counts[EOS] += sum(c.finish == "eos" for c in found)
    return counts


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.8), (0.7, 0.5)]
)
def test_frequencies_are_those_of_the_softmax(temperature: float, top_p: float, tiny: CausalLM) -> None:
    """Chi-square over 4,000 draws, seeds fixed, and another temperature's distribution is told from it."""
    with torch.no_grad():
        logits = tiny.hf(torch.tensor([ids_of("The cat")])).logits[0, -1] * 0.4
        weight = tiny.hf.get_output_embeddings().weight
        model = copy.deepcopy(tiny)
        model.hf.get_output_embeddings().weight.data = weight * 0.4
        model.hf.get_input_embeddings().weight = torch.nn.Parameter(weight.clone())
    number = 4000
    counts = first_tokens(model, number, temperature=temperature, top_p=top_p)
    expected = by_hand(logits, temperature, top_p)
    assert counts.sum() == number
    assert counts[expected == 0].sum() == 0
    value, freedom = chi_square(counts, number * expected)
    assert freedom >= 3
    limit = freedom + 4 * (2 * freedom) ** 0.5
    assert value < limit
    wrong, _ = chi_square(counts, number * by_hand(logits, 1.6 * temperature, 1.0).clamp_min(1e-12))
    assert wrong > limit


Ended = tuple[str, int, str]
"""Text, tokens and finish of a completion."""


@pytest.mark.parametrize(
    ("answer", "options", "wanted"),
    [
        ("yes", {}, ("yes", 3, "eos")),
        ("yes\ndef", {}, ("yes\ndef", 7, "stop")),
        ("yes\ndef more", {}, ("yes\ndef", 7, "stop")),
        ("yes", {"tokens": 2}, ("ye", 2, "length")),
        ("yes", {"tokens": 3}, ("yes", 3, "length")),
        ("yes", {"tokens": 4}, ("yes", 3, "eos")),
        ("", {}, ("", 0, "eos")),
    ],
)
def test_a_row_ends_by_what_happened_to_it(answer: str, options: dict[str, Any], wanted: Ended) -> None:
    model = scripted({"Q:": answer, "another": "x" * 30})
    requests = requests_of(["Q:", "another"], lambda text: "\ndef" in text)
    found = complete(model, TOKENIZER, settings_of(model, **options), requests)[0]
    assert (found.text, found.tokens, found.finish) == wanted


@pytest.mark.parametrize(
    ("context", "wanted"),
    [
        (5, ("yes", 3, "context")),
        (2, ("", 0, "context")),
        (1, ("", 0, "context")),
        (6, ("yes!", 4, "context")),
    ],
)
def test_the_models_context_is_an_end(context: int, wanted: Ended) -> None:
    """A prompt of two tokens; one as long as the context, or longer, has an empty completion."""
    model = scripted({"Q:": "yes!?"}, context=context)
    (found,) = complete(model, TOKENIZER, settings_of(model), requests_of(["Q:"]))
    assert (found.text, found.tokens, found.finish) == wanted
    assert context_length(model) == context


def test_every_end_id_of_model_tokenizer_and_caller_ends_a_row() -> None:
    """The config names one, the model's generation config another, the tokenizer a third, the caller a
    fourth.
    """
    letters = {name: ids_of(name)[0] for name in "abcd"}
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "c"
    for name, own in letters.items():
        model = scripted({"Q:": [*ids_of("yes"), own, own]})
        model.hf.config.eos_token_id = letters["a"]
        model.hf.generation_config.eos_token_id = [letters["b"]]
        settings = settings_of(model, tokenizer=tokenizer, end_ids=[letters["d"]])
        (found,) = complete(model, TOKENIZER, settings, requests_of(["Q:"]))
        assert (found.text, found.finish) == ("yes", "eos"), name
        assert describe_settings(settings, model)["eos_token_ids"] == sorted(letters.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error_that_names_row_and_position(
    value: float, tiny: CausalLM
) -> None:
    model = copy.deepcopy(tiny)
    with torch.no_grad():
        model.hf.model.norm.weight[0] = value
    with pytest.raises(InferenceFailed, match=r"^6: logits are not finite after 0 new tokens"):
        complete(model, TOKENIZER, settings_of(model), requests_of(PROMPTS))


def test_one_row_that_turns_nan_later_is_named() -> None:
    model = scripted({"good": "y" * 9, "bad": "y" * 9})
    body = model.hf.base_model

    def spoil(module: Any, arguments: Any, output: Any) -> None:
        for number, row in enumerate(output.cache.rows):
            if row[:3] == ids_of("bad") and len(row) == 7:
                output.last_hidden_state[number, -1, 5] = float("nan")

    body.register_forward_hook(spoil)
    with pytest.raises(InferenceFailed, match=r"^1: logits are not finite after 4 new tokens"):
        complete(model, TOKENIZER, settings_of(model), requests_of(["good", "bad"]))


def test_the_cache_goes_by_the_name_that_this_transformers_has_for_it() -> None:
    """`past_key_values` before 5.24, `cache` since."""
    model = scripted({"Q:": "yes", "other": "no"})
    new = model.hf.base_model.forward

    def old(
        input_ids: Any,
        attention_mask: Any,
        position_ids: Any,
        past_key_values: Any = None,
        use_cache: bool = True,
    ) -> Any:
        out = new(input_ids, attention_mask, position_ids, past_key_values)
        return SimpleNamespace(last_hidden_state=out.last_hidden_state, past_key_values=out.cache)

    model.hf.base_model.forward = old
    found = complete(model, TOKENIZER, settings_of(model), requests_of(["Q:", "other"]))
    assert [c.text for c in found] == ["yes", "no"]


def test_a_model_that_keeps_no_cache_is_refused() -> None:
    model = scripted({"Q:": "yes"})
    model.hf.base_model.register_forward_hook(lambda m, a, output: setattr(output, "cache", None))
    with pytest.raises(InferenceFailed, match="keeps no key-value cache"):
        complete(model, TOKENIZER, settings_of(model), requests_of(["Q:"]))


def test_the_described_settings_are_those_the_loop_uses(tiny: CausalLM) -> None:
    settings = settings_of(tiny, tokens=7, temperature=0.5, top_p=0.9)
    described = describe_settings(settings, tiny)
    assert (
        described["do_sample"],
        described["temperature"],
        described["top_p"],
        described["max_new_tokens"],
    ) == (
        True,
        0.5,
        0.9,
        7,
    )
    before = complete(tiny, TOKENIZER, settings, requests_of(PROMPTS))
    assert max(c.tokens for c in before) == 7
    settings.temperature, settings.max_new_tokens = 3.0, 5
    after = complete(tiny, TOKENIZER, settings, requests_of(PROMPTS))
    assert (describe_settings(settings, tiny)["temperature"], max(c.tokens for c in after)) == (3.0, 5)
    assert [c.text[:3] for c in after] != [c.text[:3] for c in before]


def test_greedy_is_described_as_greedy_and_the_models_own_config_is_listed_but_not_applied(
    tiny: CausalLM,
) -> None:
    model = copy.deepcopy(tiny)
    plain = texts(tiny, PROMPTS)
    own = model.hf.generation_config
    own.do_sample, own.temperature, own.repetition_penalty, own.top_k = True, 0.3, 1.9, 3
    described = describe_settings(settings_of(model), model)
    assert (described["do_sample"], described["temperature"], described["top_p"]) == (False, 0.0, 1.0)
    assert described["model_settings_not_followed"].items() >= {"repetition_penalty": 1.9, "top_k": 3}.items()
    assert texts(model, PROMPTS) == plain


def test_the_model_is_left_in_the_mode_it_was_in(tiny: CausalLM) -> None:
    tiny.train()
    texts(tiny, PROMPTS[:1])
    assert tiny.training
    tiny.eval()
    texts(tiny, PROMPTS[:1])
    assert not tiny.training


def test_a_character_of_several_tokens_is_whole_once_they_are_there() -> None:
    """Bytes are tokens here: é has two, € three. Cut off, it is no wrong character but a missing one."""
    model = scripted({"Q:": "né 5€\n", "é": "é"})
    seen: list[str] = []
    requests = requests_of(["Q:", "é"], lambda text: bool(seen.append(text)))
    found = complete(model, TOKENIZER, settings_of(model), requests)
    assert [c.text for c in found] == ["né 5€\n", "é"]
    assert [text.rstrip("\N{REPLACEMENT CHARACTER}") for text in seen if text.startswith("n")][:4] == [
        "n",
        "n",
        "né",
        "né ",
    ]
    (cut,) = complete(model, TOKENIZER, settings_of(model, tokens=2), requests_of(["Q:"]))
    assert (cut.text.rstrip("\N{REPLACEMENT CHARACTER}"), cut.tokens) == ("n", 2)


def metaspace_tokenizer() -> Any:
    """As SentencePiece makes them: a word carries the space before it, and the decoder drops the first."""
    words = ["<eos>", "<pad>", "▁", "▁def", "▁return", "▁x", "f", "x", ":", "\n", "▁▁▁▁"]
    inner = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>")


def test_the_space_that_a_completion_begins_with_is_kept() -> None:
    tokenizer = metaspace_tokenizer()
    assert tokenizer.decode([5]) == "x"  # the trap
    model = scripted({})
    model.hf.base_model.table = {(3, 6, 8): [10, 4, 5, EOS]}
    (found,) = complete(model, tokenizer, settings_of(model), [Request("one", [3, 6, 8], never)])
    assert found.text == "     return x"


def test_no_requests_have_no_completions(tiny: CausalLM) -> None:
    assert complete(tiny, TOKENIZER, settings_of(tiny), []) == []


@pytest.mark.real
@pytest.mark.soak
def test_the_real_model_writes_what_transformers_writes(real_teacher: Any) -> None:
    """Two problems' chat prompts of unequal lengths, 24 greedy tokens of each; about a minute."""
    model, tokenizer = real_teacher.model, real_teacher.tokenizer
    prompts = ["Write a Python function that adds two numbers.", "Name three colours, and say why. Be brief."]
    ids = [
        tokenizer(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            ),
            add_special_tokens=False,
        )["input_ids"]
        for prompt in prompts
    ]
    found = complete(
        model,
        tokenizer,
        settings_of(model, tokens=24, tokenizer=tokenizer),
        [Request(str(number), one, never) for number, one in enumerate(ids)],
    )
    for one, completion in zip(ids, found, strict=True):
        row = torch.tensor([one])
        new = model.hf.generate(row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=24)
        wanted = tokenizer.decode(new[0, len(one) :], skip_special_tokens=True)
        assert completion.text == wanted and len(wanted) > 20
