"""Where the prunable units of an architecture live, as data.

A family is a few lines: which linear maps produce a unit (their rows are cut, with their bias) and which consume it
(their columns are cut, their bias stays), relative to one block. Hidden size, embeddings, norms and heads of tasks are
never pruned. Source: FedSpine's dependency groups (heads through query, key, value and output; channels through the
feed-forward network); that a key/value group goes together with its query heads is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from fl_edge.pruning.plan import Unit

# How many rows, columns or numbers belong to one unit.
Span = Literal["group", "queries", "query_rows", "key_rows", "channel"]
UNIT_OF: Mapping[Span, Unit] = {
    "group": "heads",  # 1: one head, or one key/value group
    "queries": "heads",  # the query heads of a group
    "query_rows": "heads",  # the query heads of a group, times the width of a head
    "key_rows": "heads",  # the width of a head
    "channel": "channels",  # 1
}


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes
    ----------
    blocks
        Path of the list of blocks in the bare model.
    rows, columns
        Linear maps whose rows (columns) belong to units: path in the block -> span of a unit.
    attributes
        Numbers that the block's modules keep of their own and that have to follow: path in the block -> span.
    channels_key
        The configuration's name for the channels of a layer.
    heads_keys
        Names in the configuration that can say "fewer heads of the same width": name -> span. Empty where the width
        of a head follows from their number.
    """

    blocks: str
    rows: Mapping[str, Span]
    columns: Mapping[str, Span]
    attributes: Mapping[str, Span]
    channels_key: str = "intermediate_size"
    heads_keys: Mapping[str, Span] = field(default_factory=dict)


_BERT = Family(
    blocks="encoder.layer",
    rows={
        "attention.self.query": "query_rows",
        "attention.self.key": "key_rows",
        "attention.self.value": "key_rows",
        "intermediate.dense": "channel",
    },
    columns={"attention.output.dense": "query_rows", "output.dense": "channel"},
    attributes={"attention.self.num_attention_heads": "queries", "attention.self.all_head_size": "query_rows"},
)
_DISTILBERT = Family(
    blocks="transformer.layer",
    rows={
        "attention.q_lin": "query_rows",
        "attention.k_lin": "key_rows",
        "attention.v_lin": "key_rows",
        "ffn.lin1": "channel",
    },
    columns={"attention.out_lin": "query_rows", "ffn.lin2": "channel"},
    attributes={"attention.n_heads": "queries"},
    channels_key="hidden_dim",
)
_LLAMA = Family(
    blocks="layers",
    rows={
        "self_attn.q_proj": "query_rows",
        "self_attn.k_proj": "key_rows",
        "self_attn.v_proj": "key_rows",
        "mlp.gate_proj": "channel",
        "mlp.up_proj": "channel",
    },
    columns={"self_attn.o_proj": "query_rows", "mlp.down_proj": "channel"},
    attributes={"mlp.intermediate_size": "channel"},
    heads_keys={"num_attention_heads": "queries", "num_key_value_heads": "group"},
)
_OPT = Family(
    blocks="decoder.layers",
    rows={
        "self_attn.q_proj": "query_rows",
        "self_attn.k_proj": "key_rows",
        "self_attn.v_proj": "key_rows",
        "fc1": "channel",
    },
    columns={"self_attn.out_proj": "query_rows", "fc2": "channel"},
    attributes={"self_attn.num_heads": "queries"},
    channels_key="ffn_dim",
)

FAMILIES: Mapping[str, Family] = {
    "bert": _BERT,
    "distilbert": _DISTILBERT,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "opt": _OPT,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "roberta": _BERT,
}
