"""A narrower residual stream: the same channels of it are kept in every tensor that it goes through.

What is left is the model whose embedding and norms give these channels alone and whose norms see no others: what is
added to the others is then never seen. Each cut is compared with that. A norm over fewer channels divides by another
number, for which a factor on its weights makes up (`models.stream_refit`).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from potstill.errors import UserError, one_line
from potstill.models.causal_lm import CausalLM, relative_gap
from potstill.models.load import plain_config
from potstill.models.matrix_inputs import most_important
from potstill.models.probes import TOLERANCE, hidden_of
from potstill.models.pruning import stack_of
from potstill.models.stream_config import ADVICE, set_hidden_size, stream_dims
from potstill.types import Batch

TOKENS = 64
"""Of the row on which a cut is compared."""


def norms_of(hf: Any, dims: Mapping[str, int]) -> dict[str, Any]:
    """By name, the modules with nothing inside but a weight, and maybe more, of the residual stream's channels."""
    found = {}
    for name, module in hf.named_modules():
        own = {each: f"{name}.{each}" in dims and of.ndim == 1 for each, of in module.named_parameters()}
        if "weight" in own and all(own.values()):
            found[name] = module
    return found


@contextlib.contextmanager
def hooked(modules: Mapping[str, Any], hook: Callable[..., Any]) -> Iterator[None]:
    """Inside, `hook` is called after each module with its name, itself, its arguments and its output."""
    hooks = [module.register_forward_hook(partial(hook, name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


@torch.no_grad()
def stream_importance(model: CausalLM, dims: Mapping[str, int], batches: Sequence[Batch]) -> Tensor:
    """importance_D in float64: the mean absolute value, over the batches' positions, of what the norms give at each
    channel, summed over the norms (Minitron, Muralidharan et al. 2024, arXiv 2407.14679).
    """
    norms, sums = norms_of(model.hf, dims), list[Tensor]()

    def add(positions_N: Tensor, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        sums.append(output.flatten(0, -2)[positions_N].abs().sum(0, dtype=torch.float64))

    for batch in batches:
        batch = batch.to(model.device)
        with hooked(norms, partial(add, batch.positions_N)):
            model.hidden(batch.input_ids_BT, batch.position_ids_BT)
    return torch.stack(sums).sum(0) / sum(len(batch.positions_N) for batch in batches)


@contextlib.contextmanager
def seeing_only(hf: Any, norms: Mapping[str, nn.Module], keep_K: Tensor) -> Iterator[None]:
    """Inside, the embedding and the norms of a model give these channels alone, and its norms see no others, as those
    of a narrower one do.

    Args:
        norms: the narrower one's, by name.
    """

    def embed(name: str, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return torch.zeros_like(output).index_copy(-1, keep_K, output[..., keep_K])

    def normalise(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return torch.zeros_like(output).index_copy(-1, keep_K, norms[name](args[0][..., keep_K]))

    modules = {name: hf.get_submodule(name) for name in norms}
    with hooked({"embedding": hf.get_input_embeddings()}, embed), hooked(modules, normalise):
        yield


def kept_of_stream(model: CausalLM, hidden_size: int, batches: Sequence[Batch]) -> Tensor:
    """keep_K: the channels of most importance on the batches, rising.

    Raises:
        UserError: a hidden size that this model cannot have.
    """
    dims = stream_dims(model.hf.config, set_hidden_size(plain_config(model.hf.config), hidden_size))
    return most_important(stream_importance(model, dims, batches), hidden_size)


@torch.no_grad()
def narrowed(model: CausalLM, keep_K: Tensor) -> CausalLM:
    """A float32 student with these channels of the model's residual stream; every tensor is a copy, ties are kept.

    Raises:
        UserError: a model in which other dimensions follow the hidden size, or that is not what is left of it.
    """
    config = set_hidden_size(plain_config(model.hf.config), len(keep_K))
    dims = stream_dims(model.hf.config, config)
    kept = {
        name: tensor.index_select(dims[name], keep_K) if name in dims else tensor
        for name, tensor in model.state().items()
    }
    try:
        hf = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=False
        )
        hf.load_state_dict(kept, strict=True)
    except (ValueError, TypeError, RuntimeError, LookupError, ArithmeticError, AttributeError) as error:
        raise UserError(
            f"student.hidden_size: {type(model.hf).__name__} cannot be cut to {len(keep_K)} channels of the residual"
            f" stream: {one_line(error)} {ADVICE}"
        ) from error
    hf.generation_config = model.hf.generation_config
    student = CausalLM(hf.to(model.device), name=model.name)
    student.train(model.training)
    was_training = model.training
    model.eval(), student.eval()
    try:
        norms = copy.deepcopy(norms_of(student.hf, dims))
        _settle_embedding(model, student, norms, keep_K)
        _require_same(model, student, norms, keep_K)
        student.probe()
    finally:
        model.train(was_training), student.train(was_training)
    return student


def _settle_embedding(
    model: CausalLM, student: CausalLM, norms: Mapping[str, nn.Module], keep_K: Tensor
) -> None:
    """Gemma multiplies its embeddings by the square root of the hidden size: the weights make up for another one, and
    where the head is tied to them the last norm does.
    """
    ids_BT = _some_ids(model)
    expected_BTK, actual_BTK = (_first_input(of, ids_BT) for of in (model, student))
    expected_BTK = expected_BTK[..., keep_K]
    ratio = float((expected_BTK * actual_BTK).sum() / (actual_BTK**2).sum().clamp_min(1e-30))
    if abs(ratio - 1) <= TOLERANCE:
        return
    embedding, head = student.hf.get_input_embeddings(), student.hf.get_output_embeddings()
    embedding.weight *= ratio
    if head.weight is embedding.weight:
        name = _called(student, norms, ids_BT)[-1]
        scale_norm(student.hf.get_submodule(name), 1 / ratio)


def scale_norm(norm: Any, factor: float) -> None:
    """Multiply what a norm gives by a factor, but for its bias: its weight, or one more than its weight."""
    probe: Any = copy.deepcopy(norm)
    if getattr(probe, "bias", None) is not None:
        probe.bias.zero_()
    x_1D = torch.linspace(-1, 2, len(probe.weight), device=probe.weight.device)[None]
    given = []
    for weight in (0.0, 1.0):
        probe.weight.fill_(weight)
        given.append(float(probe(x_1D).abs().sum()))
    added = round(given[0] / (given[1] - given[0]))  # 0 of most, 1 of Gemma's and Nemotron's
    norm.weight.copy_(factor * (norm.weight + added) - added)


def _require_same(model: CausalLM, student: CausalLM, norms: Mapping[str, nn.Module], keep_K: Tensor) -> None:
    """UserError for a student that is not what is left of the model where its norms see and give these channels alone.

    Args:
        norms: the student's, as they were cut.
    """
    ids_BT = _some_ids(model)
    actual_BTV = student.head(student.hidden(ids_BT))
    with seeing_only(model.hf, norms, keep_K):
        expected_BTV = model.head(model.hidden(ids_BT))
    gap = relative_gap(actual_BTV, expected_BTV)
    if not gap <= TOLERANCE:
        raise UserError(
            f"student.hidden_size: {type(model.hf).__name__} with {len(keep_K)} channels of the residual stream is not"
            f" what is left of the whole: its logits differ by {gap:.2g} of the largest. Something else follows its"
            f" width. {ADVICE}"
        )


def _some_ids(model: CausalLM) -> Tensor:
    longest = getattr(model.hf.config.get_text_config(), "max_position_embeddings", None) or TOKENS
    return model.some_ids(1, min(TOKENS, longest))


def _first_input(model: CausalLM, ids_BT: Tensor) -> Tensor:
    """hidden_BTD in front of the first layer."""
    found: list[Tensor] = []
    layers: Any = model.hf.get_submodule(stack_of(model)[0].removesuffix("."))
    hook = layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: found.append(hidden_of(args or kwargs["hidden_states"])), with_kwargs=True
    )
    try:
        model.hidden(ids_BT)
    finally:
        hook.remove()
    return found[0]


def _called(model: CausalLM, norms: Mapping[str, nn.Module], ids_BT: Tensor) -> list[str]:
    """Names of the norms in the order in which a forward calls them."""
    order: list[str] = []
    modules = {name: model.hf.get_submodule(name) for name in norms}
    with hooked(modules, lambda name, *given: order.append(name)):
        model.hidden(ids_BT)
    return order
