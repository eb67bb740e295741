"""A GGUF file whose weights stay as they are stored: llama.cpp runs the layers, PyTorch the head.

The layers are asked through the server inside xllamacpp's wheel, on the loopback interface, for the hidden
state after the last norm at each token. Each document of a packed row is asked for by itself, so that none
sees another. The head alone is read as numbers, for the loss works on hidden states and a head.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gguf import GGUFReader, Keys
from gguf.quants import dequantize
from torch import Tensor, nn

from potstill.errors import UserError, one_line
from potstill.io.silence import quiet_process, quiet_transformers
from potstill.models.causal_lm import CausalLM, documents
from potstill.models.load import load_config, plain_config
from potstill.models.safetensors_files import check_model_files

HEADS = ("output.weight", "token_embd.weight")
"""The second where embeddings are tied."""
ANSWER_S = 600.0
LONGEST = 2048


class LlamaCppLM(CausalLM):
    """Make one with `open`. Its parameters are those of the head."""

    def __init__(self, hf: Any, name: str, path: Path, server: Any, tokens: int) -> None:
        super().__init__(hf, name)
        self.path, self.server, self.tokens, self.is_packed = path, server, tokens, True
        self.post = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    @classmethod
    def open(
        cls, path: Path, dtype: torch.dtype, tokens: int | None, name: str, own_config: Any = None
    ) -> LlamaCppLM:
        """Args:
        own_config: the file's, where it has been read already.
        tokens: of the longest row; None: what the model was made for, at most LONGEST.

        Raises:
            UserError: no whole GGUF file, or one that llama.cpp cannot run.
        """
        check_model_files(path)
        file = GGUFReader(path)
        _require_one_file(path, file)
        config = plain_config(load_config(path) if own_config is None else own_config)
        made_for = getattr(config.get_text_config(), "max_position_embeddings", None) or LONGEST
        with quiet_transformers(), torch.device("meta"):
            hf = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        weight_VD, bias_V = _head(path, file, dtype)
        V, D = weight_VD.shape
        head = nn.Linear(D, V, bias=bias_V is not None, device="meta")
        head.weight = nn.Parameter(weight_VD)
        if bias_V is not None:
            head.bias = nn.Parameter(bias_V)
        hf.set_output_embeddings(head)
        for part, _ in list(hf.base_model.named_children()):  # the layers are llama.cpp's
            setattr(hf.base_model, part, nn.Identity())
        hf.set_input_embeddings(head)  # Transformers knows an output by its having an input; it is not asked
        tokens = tokens or min(made_for, LONGEST)
        model = cls(hf.requires_grad_(False), name, path, _server(path, tokens), tokens)
        model.eval().probe()
        return model

    def weights(self, *, remove_duplicate: bool = True) -> Iterator[tuple[str, Tensor]]:
        """The file as it lies on disk, whatever its name, and the head that was read from it."""
        yield "gguf", torch.from_numpy(np.memmap(self.path, np.uint8, "c"))
        yield from super().weights(remove_duplicate=remove_duplicate)

    def hidden(
        self, input_ids_BT: Tensor, position_ids_BT: Tensor | None = None, mask_BT: Tensor | None = None
    ) -> Tensor:
        """See `CausalLM.hidden`; of the head's type, 0 where a row is padded."""
        B, T = input_ids_BT.shape
        if mask_BT is None:
            starts_BT = torch.arange(T).expand(B, T) if position_ids_BT is None else position_ids_BT.cpu()
            numbers_BT = documents(starts_BT) + 1
        else:
            numbers_BT = torch.where(mask_BT.cpu().bool(), 1, 0)
        places = [
            (row, torch.nonzero(numbers_BT[row] == n)[:, 0])
            for row in range(B)
            for n in _some(numbers_BT[row])
        ]
        head = self.hf.get_output_embeddings().weight
        hidden_BTD = torch.zeros(B, T, head.shape[1], dtype=head.dtype)
        ids_BT = input_ids_BT.cpu()
        answers = self._ask([ids_BT[row, place].tolist() for row, place in places])
        for (row, place), answer in zip(places, answers, strict=True):
            hidden_BTD[row, place] = answer.to(head.dtype)
        return hidden_BTD.to(input_ids_BT.device)

    def _probe_head(self) -> None:
        """There are no other logits to compare with here. What it says beside its full weights is measured
        before a run.
        """
        if not bool(torch.isfinite(self.head(self.hidden(self._some_ids(2, 6)))).all()):
            raise UserError(f"{self.name}: its logits are not finite. Its weights are damaged.")

    def _probe_packing(self) -> None:
        first, second = self._some_ids(2, 6)
        packed_TD = self.hidden(torch.cat([first, second])[None], torch.arange(6).repeat(2)[None])[0]
        alone_TD = self.hidden(second[None])[0]
        if not torch.equal(packed_TD[6:], alone_TD):
            raise UserError(
                f"{self.name}: llama.cpp answers the same document differently. It cannot be used."
            )

    def _ask(self, documents: list[list[int]]) -> list[Tensor]:
        """hidden_TD of each document, float32."""
        if (longest := max(map(len, documents))) > self.tokens:
            raise UserError(
                f"{self.name}: a document of {longest} tokens, llama.cpp was told of {self.tokens} at most."
                " Give `tokens` when it is loaded."
            )
        body = json.dumps({"content": documents, "embd_normalize": -1}).encode()
        request = urllib.request.Request(
            f"{self.server.listening_address}/embedding", body, {"Content-Type": "application/json"}
        )
        try:
            with self.post(request, timeout=ANSWER_S) as answer:
                told = sorted(json.load(answer), key=lambda one: int(one["index"]))
        except (OSError, ValueError) as error:
            said = error.read().decode(errors="replace") if isinstance(error, urllib.error.HTTPError) else ""
            raise UserError(
                f"{self.name}: llama.cpp gave no hidden states: {one_line(error)} {said}"
            ) from error
        found = [torch.tensor(one["embedding"], dtype=torch.float32) for one in told]
        if [len(hidden_TD) for hidden_TD in found] != [len(document) for document in documents]:
            raise UserError(
                f"{self.name}: llama.cpp answered for {sum(map(len, found))} tokens of"
                f" {sum(map(len, documents))}. It cannot be used."
            )
        return found


def _require_one_file(path: Path, file: GGUFReader) -> None:
    """Of a model in several files llama.cpp would open the others itself, and no hash would know of them."""
    count = file.get_field(Keys.Split.LLM_KV_SPLIT_COUNT)
    if count is not None and (parts := int(count.contents())) > 1:
        raise UserError(
            f"{path}: one of {parts} files of a model. Put them together with llama.cpp's"
            " `llama-gguf-split --merge`."
        )


def _some(numbers_T: Tensor) -> list[int]:
    """The documents of a row: numbered from 1 where it is not padding."""
    return sorted({int(number) for number in numbers_T if number > 0})


def _head(path: Path, file: GGUFReader, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """weight_VD and bias_V of the output, as numbers."""
    tensors = {tensor.name: tensor for tensor in file.tensors}
    found = next((tensors[name] for name in HEADS if name in tensors), None)
    if found is None:
        raise UserError(f"{path}: neither {' nor '.join(HEADS)} is in it. A causal language model is needed.")
    weight_VD = torch.from_numpy(np.array(dequantize(found.data, found.tensor_type))).to(dtype)
    bias = tensors.get("output.bias")
    return weight_VD, None if bias is None else torch.from_numpy(np.array(bias.data)).to(dtype)


def _server(path: Path, tokens: int) -> Any:
    try:
        import xllamacpp
    except Exception as error:  # a library that lacks another one, say
        raise UserError(
            f"teacher.weights: stored: xllamacpp cannot be imported: {one_line(error)}"
        ) from error
    params = xllamacpp.CommonParams()
    params.model.path = os.fspath(path)
    # A document is answered in one piece, and one after another: the same whatever else is asked for.
    params.n_ctx = params.n_batch = params.n_ubatch = tokens
    params.n_parallel = 1
    params.embedding, params.pooling_type = True, xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
    params.verbosity, params.warmup = -1, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    try:
        with quiet_process():
            return xllamacpp.Server(params)
    except Exception as error:  # llama.cpp raises what it likes over an architecture that it does not know
        raise UserError(f"{path}: llama.cpp cannot load it: {one_line(error)}") from error
