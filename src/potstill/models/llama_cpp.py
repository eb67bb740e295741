"""A GGUF file whose weights stay as they are stored: llama.cpp runs the layers, PyTorch the head.

The server in xllamacpp's wheel, on the loopback interface, returns the hidden state after the last norm at
each token. Documents of a packed row are sent apart, so that none attends to another. Only the head is read
into PyTorch, as the loss works on hidden states and a head.
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
from potstill.models.causal_lm import CausalLM
from potstill.models.load import load_config, plain_config
from potstill.models.model_files import check_model_files
from potstill.models.rope import document_numbers

HEADS = ("output.weight", "token_embd.weight")
"""The second where embeddings are tied."""
TIMEOUT_S = 600.0
MAX_TOKENS = 2048


class LlamaCppLM(CausalLM):
    """Made by `open`. Its only parameters are those of the head."""

    keeps_cache = False

    def __init__(self, hf: Any, name: str, path: Path, server: Any, tokens: int) -> None:
        super().__init__(hf, name)
        self.path, self.server, self.tokens, self.is_packed = path, server, tokens, True
        self.post = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    @classmethod
    def open(
        cls, path: Path, dtype: torch.dtype, tokens: int | None, name: str, own_config: Any = None
    ) -> LlamaCppLM:
        """Start the server and probe it.

        Args:
            dtype: of the head.
            tokens: of the longest document; None: the model's own limit, at most MAX_TOKENS.
            own_config: the file's, where it has been read already.

        Raises:
            UserError: not a whole GGUF file, or one that llama.cpp cannot run.
        """
        check_model_files(path)
        file = GGUFReader(path)
        _require_one_file(path, file)
        config = plain_config(load_config(path) if own_config is None else own_config)
        limit = getattr(config.get_text_config(), "max_position_embeddings", None) or MAX_TOKENS
        with quiet_transformers(), torch.device("meta"):
            hf = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        weight_VD, bias_V = _head(path, file, dtype)
        V, D = weight_VD.shape
        head = nn.Linear(D, V, bias=bias_V is not None, device="meta")
        head.weight = nn.Parameter(weight_VD)
        if bias_V is not None:
            head.bias = nn.Parameter(bias_V)
        hf.set_output_embeddings(head)
        for part, _ in list(hf.base_model.named_children()):  # llama.cpp runs the layers
            setattr(hf.base_model, part, nn.Identity())
        hf.set_input_embeddings(head)  # never called; without one Transformers returns no output embedding
        tokens = tokens or min(limit, MAX_TOKENS)
        model = cls(hf.requires_grad_(False), name, path, _server(path, tokens), tokens)
        model.eval().probe()
        return model

    def weights(self, *, remove_duplicate: bool = True) -> Iterator[tuple[str, Tensor]]:
        """The bytes of the file, and the head that was read from it."""
        yield "gguf", torch.from_numpy(np.memmap(self.path, np.uint8, "c"))
        yield from super().weights(remove_duplicate=remove_duplicate)

    def hidden(
        self, input_ids_BT: Tensor, position_ids_BT: Tensor | None = None, mask_BT: Tensor | None = None
    ) -> Tensor:
        """See `CausalLM.hidden`; in the dtype of the head, and 0 where a row is padded."""
        B, T = input_ids_BT.shape
        if mask_BT is None:
            starts_BT = torch.arange(T).expand(B, T) if position_ids_BT is None else position_ids_BT.cpu()
            numbers_BT = document_numbers(starts_BT) + 1
        else:
            numbers_BT = torch.where(mask_BT.cpu().bool(), 1, 0)
        places = [
            (row, torch.nonzero(numbers_BT[row] == n)[:, 0])
            for row in range(B)
            for n in _documents(numbers_BT[row])
        ]
        head = self.hf.get_output_embeddings().weight
        hidden_BTD = torch.zeros(B, T, head.shape[1], dtype=head.dtype)
        ids_BT = input_ids_BT.cpu()
        hidden = self._request([ids_BT[row, place].tolist() for row, place in places])
        for (row, place), hidden_TD in zip(places, hidden, strict=True):
            hidden_BTD[row, place] = hidden_TD.to(head.dtype)
        return hidden_BTD.to(input_ids_BT.device)

    def _probe_head(self) -> None:
        """There are no other logits to compare with; the difference from the full weights is measured by
        `potstill check`.
        """
        if not bool(torch.isfinite(self.head(self.hidden(self.some_ids(2, 6)))).all()):
            raise UserError(f"{self.name}: its logits are not finite. Its weights are damaged.")

    def find_packing_fault(self, tokens: int = 12) -> str | None:
        """Equal bits are asked for; anything else is a fault of the server, which packing or not would meet."""
        first, second = self.some_ids(2, tokens // 2)
        # Equal bits, whatever else is in the request: a row's targets are a function of the row.
        packed_TD = self.hidden(torch.cat([first, second])[None], torch.arange(tokens // 2).repeat(2)[None])[
            0
        ]
        alone_TD = self.hidden(second[None])[0]
        if not torch.equal(packed_TD[tokens // 2 :], alone_TD):
            raise UserError(
                f"{self.name}: llama.cpp gives one document different hidden states. It cannot be used."
            )
        return None

    def _request(self, documents: list[list[int]]) -> list[Tensor]:
        """hidden_TD of each document, float32."""
        if (longest := max(map(len, documents))) > self.tokens:
            raise UserError(
                f"{self.name}: a document of {longest} tokens, llama.cpp was started for {self.tokens}."
                " Give `tokens` when it is loaded."
            )
        body = json.dumps({"content": documents, "embd_normalize": -1}).encode()
        request = urllib.request.Request(
            f"{self.server.listening_address}/embedding", body, {"Content-Type": "application/json"}
        )
        try:
            with self.post(request, timeout=TIMEOUT_S) as response:
                entries = sorted(json.load(response), key=lambda entry: int(entry["index"]))
        except (OSError, ValueError) as error:
            reason = (
                error.read().decode(errors="replace") if isinstance(error, urllib.error.HTTPError) else ""
            )
            raise UserError(
                f"{self.name}: llama.cpp gave no hidden states: {one_line(error)} {reason}"
            ) from error
        hidden = [torch.tensor(entry["embedding"], dtype=torch.float32) for entry in entries]
        if [len(hidden_TD) for hidden_TD in hidden] != [len(document) for document in documents]:
            raise UserError(
                f"{self.name}: llama.cpp answered for {sum(map(len, hidden))} tokens of"
                f" {sum(map(len, documents))}. It cannot be used."
            )
        return hidden


def _require_one_file(path: Path, file: GGUFReader) -> None:
    """llama.cpp would open the other files of a model by itself, and no hash would cover them."""
    count = file.get_field(Keys.Split.LLM_KV_SPLIT_COUNT)
    if count is not None and (parts := int(count.contents())) > 1:
        raise UserError(
            f"{path}: one of {parts} files of a model. Join them with llama.cpp's `llama-gguf-split --merge`."
        )


def _documents(numbers_T: Tensor) -> list[int]:
    """The documents of a row: numbered from 1 where it is not padding."""
    return sorted({int(number) for number in numbers_T if number > 0})


def _head(path: Path, file: GGUFReader, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """weight_VD and bias_V of the output embedding, dequantised."""
    tensors = {tensor.name: tensor for tensor in file.tensors}
    head = next((tensors[name] for name in HEADS if name in tensors), None)
    if head is None:
        raise UserError(f"{path}: neither {' nor '.join(HEADS)} is in it. A causal language model is needed.")
    weight_VD = torch.from_numpy(np.array(dequantize(head.data, head.tensor_type))).to(dtype)
    bias = tensors.get("output.bias")
    return weight_VD, None if bias is None else torch.from_numpy(np.array(bias.data)).to(dtype)


def _server(path: Path, tokens: int) -> Any:
    try:
        import xllamacpp
    except Exception as error:  # such as a shared library that is missing
        raise UserError(
            f"teacher.weights: stored: xllamacpp cannot be imported: {one_line(error)}"
        ) from error
    params = xllamacpp.CommonParams()
    params.model.path = os.fspath(path)
    # Each document in one batch, and one after another: the same result whatever else is requested.
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
    except Exception as error:  # llama.cpp raises anything over an architecture that it does not have
        raise UserError(f"{path}: llama.cpp cannot load it: {one_line(error)}") from error
