"""A causal language model of Hugging Face, run from its files with one decoder layer in memory at a time.

Source of the idea: COMP's layer step, in which a single layer is resident; how it is done here is ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fl_edge.comp.calls import Call, standing_in
from fl_edge.comp.memory import trim
from fl_edge.errors import DataError
from fl_edge.models.folder import ModelFolder

LOGITS_BYTES = 2**26
_PIECE_BYTES = 2**25
_BYTES_A_LOGIT = 10  # as the head gives it, in float32, and its log-softmax


class Checkpoint:
    """The files of a causal language model, and its decoder layers one by one.

    The model itself is only a skeleton without memory. What a call needs of it is read for that call; a decoder layer
    stays from :meth:`load` to :meth:`release`. The folder is never written to, nothing is unpickled, no code of the
    folder runs, and no autograd graph is ever built.

    Parameters
    ----------
    folder
        ``config.json`` with ``model.safetensors`` or its shards and index.
    device
        Where layers, hidden states and results are.
    dtype
        What the model computes in; by default the type that most numbers in the files have.

    Attributes
    ----------
    skeleton
        The model: parameters on the meta device, buffers on ``device``, evaluation mode.
    config
        Its configuration.
    num_layers
        Decoder layers.
    on_release
        Called with every layer that is given back, by which one sees how far a pass is.

    Raises
    ------
    ConfigError
        An architecture that is unknown or is no causal decoder.
    DataError
        A folder without a model, a damaged, missing or quantised file, or files that do not fit the configuration.
    """

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self._opened = opened = ModelFolder(folder, device, dtype)
        self.folder, self.device, self.dtype = folder, device, opened.dtype
        self.config, self.skeleton = opened.config, opened.skeleton
        self._path, self._blocks = opened.block_path, opened.blocks
        self.on_release: Callable[[int], None] = lambda _: None
        self._empty, self._loaded = list(self._blocks), dict[int, nn.Module]()
        self.num_layers = len(self._empty)
        embedding = opened.names(self.skeleton.get_input_embeddings())
        self._head: Set[str] = opened.names(self.skeleton.get_output_embeddings())
        (self._embedding,) = embedding
        self._vocabulary, self._width = opened.shape(self._embedding)
        self._around: Set[str] = {
            name for name in opened.stored.keys() - embedding - self._head if not name.startswith(f"{self._path}.")
        }
        self._calls: tuple[int, Sequence[Call]] = (0, ())

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors read so far, as they are in the files."""
        return self._opened.shards.bytes_read

    @property
    def outside(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters outside the decoder layers, by name; of tied ones, one."""
        names = self._opened.stored.keys() - self.skeleton.all_tied_weights_keys.keys()
        return {name: self._opened.shape(name) for name in sorted(names) if not name.startswith(f"{self._path}.")}

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Yield a parameter in pieces of rows, so that a large embedding is never in memory as a whole."""
        rows, *rest = self._opened.shape(name)
        step = max(1, _PIECE_BYTES // (prod(rest) * self.dtype.itemsize))
        for start in range(0, rows, step):
            yield self._opened.tensor(name, slice(start, start + step))

    def load(self, layer: int) -> nn.Module:
        """Read a decoder layer and return it, frozen; it stands in the skeleton until :meth:`release`.

        It is a new one at each call: what was done to an earlier one, such as slicing, does not come back.

        Raises
        ------
        DataError
            The file has been lost or changed since the checkpoint was opened.
        """
        block = copy.deepcopy(self._empty[layer], {id(self.config): self.config})
        self._opened.fill(block, f"{self._path}.{layer}")
        self._blocks[layer] = self._loaded[layer] = block
        return block

    def release(self, layer: int) -> None:
        """Give back the memory of a loaded layer."""
        self._loaded.pop(layer).to("meta")
        self._blocks[layer] = self._empty[layer]
        trim()
        self.on_release(layer)

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """Return what enters the first layer.

        Of the embedding only the rows that occur are read.

        Parameters
        ----------
        tokens
            (s, n) int64: sequences of full length, without padding.

        Returns
        -------
        Tensor
            (s, n, d).

        Raises
        ------
        DataError
            A token that the vocabulary does not have.
        """
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self._vocabulary:
            allowed = f"tokens must be 0 to {self._vocabulary - 1} for the model in {self.folder}"
            raise DataError(f"{allowed}, got {int(tokens.min())} to {int(tokens.max())}")
        rows, places = tokens.to(self.device).unique(return_inverse=True)  # type: ignore[no-untyped-call]
        table = self._opened.tensor(self._embedding, rows)
        hidden = torch.empty(*tokens.shape, self.config.hidden_size, dtype=self.dtype, device=self.device)
        with self._in_memory(self._around):
            for sequence, place in zip(hidden, places, strict=True):
                sequence.copy_(self._record(table[place][None])[0])
        return hidden

    @torch.no_grad()
    def run(self, layer: int, hidden: Tensor) -> Tensor:
        """Apply a loaded layer, with the masks and positions that the model itself would hand to it.

        Parameters
        ----------
        layer
            One that is loaded (KeyError otherwise); it may have been sliced.
        hidden
            (s, n, d) sequences of full length; all are computed at once, so the caller bounds memory by s.

        Returns
        -------
        Tensor
            (s, n, d).
        """
        block, length = self._loaded[layer], hidden.shape[1]
        if self._calls[0] != length:
            with self._in_memory(self._around):
                self._record(self._zeros(length))
        call = self._calls[1][layer]
        leaving: Tensor | tuple[Tensor, ...] = block(hidden, *call.places, **call.names)
        return leaving if isinstance(leaving, Tensor) else leaving[0]

    @torch.no_grad()
    def nll(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Return the negative log-likelihood of each next token.

        Logits are computed for as many tokens at once as fit into 64 MiB.

        Parameters
        ----------
        hidden
            (s, n, d), what leaves the last layer, before the final norm.
        tokens
            (s, n) int64.

        Returns
        -------
        Tensor
            (s, n - 1) float32, nats.
        """
        few = max(1, LOGITS_BYTES // (_BYTES_A_LOGIT * self._vocabulary))
        start = self._zeros(1)
        found = torch.empty(len(tokens), tokens.shape[1] - 1, device=self.device)
        with self._in_memory(self._around | self._head):
            for states, following, row in zip(hidden, tokens.to(self.device), found, strict=True):
                pieces = zip(states[:-1].split(few), following[1:].split(few), row.split(few), strict=True)
                for leaving, answers, place in pieces:
                    with standing_in(self._blocks, leaving[None]):
                        logits = self.skeleton(inputs_embeds=start, use_cache=False).logits[0]
                    place.copy_(cross_entropy(logits.float(), answers, reduction="none"))
        return found

    def _record(self, inputs: Tensor) -> Tensor:
        """Run the bare model without its layers; keep what it hands to each, return what enters the first."""
        with standing_in(self._blocks) as calls:
            self.skeleton.base_model(inputs_embeds=inputs, use_cache=False)
        self._calls = inputs.shape[1], calls
        return calls[0].hidden

    @contextmanager
    def _in_memory(self, names: Set[str]) -> Iterator[None]:
        """Parameters outside the layers, read for as long as this lasts."""
        there = {name: self._opened.tensor(name) for name in names}
        self.skeleton.load_state_dict(there, strict=False, assign=True)
        try:
            yield
        finally:
            gone = {name: tensor.to("meta") for name, tensor in there.items()}
            self.skeleton.load_state_dict(gone, strict=False, assign=True)

    def _zeros(self, length: int) -> Tensor:
        return torch.zeros(1, length, self._width, dtype=self.dtype, device=self.device)
