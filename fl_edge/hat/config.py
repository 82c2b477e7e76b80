"""Settings of HAT. What is known of the paper's: threshold 0.6, 128 new tokens, w_ce = 0.1; the rest is ours.

Source: HAT (arXiv 2503.18989), its abstract and notes on it.
"""

from __future__ import annotations

from dataclasses import dataclass

from fl_edge.config import setting
from fl_edge.hat.chunking import LONGEST, RULES, SHORTEST


@dataclass
class HatConfig:
    """How a device generates text together with the cloud."""

    shallow: int = setting(0, "m: decoder layers on the device; 0: a sixteenth, rounded up", low=0)
    new_tokens: int = setting(128, "tokens of an answer, at most", low=1)
    temperature: float = setting(0.0, "0: greedy; else tokens are drawn", low=0.0, high=100.0)
    top_p: float = setting(
        1.0, "only the likeliest tokens that reach this probability together are drawn", low=0.0, high=1.0
    )

    # drafts
    threshold: float = setting(
        0.6, "eta: a draft ends with the first token of which the adapter is less sure", low=0.0, high=1.0
    )
    max_drafts: int = setting(6, "tokens of a draft, at most; 0: none, the U-shaped split", low=0, high=64)
    guesses: int = setting(2, "k: guesses from which is drafted on during verification; 0: none", low=0, high=16)

    tree_rows: int = setting(8, "rows of a draft tree of Medusa's heads, with the newest token's own", low=1, high=64)

    # HAT+, which is ours
    adaptive: bool = setting(
        False, "drafts are trees that grow as long as they pay by what was measured, also during verification; "
        "threshold, max_drafts and guesses mean nothing then"
    )  # fmt: skip
    draft_width: int = setting(16, "tokens of such a tree that are run side by side; 1: chains", low=1, high=64)
    int8: bool = setting(False, "hidden states travel as bytes; the text is then that of a model that rounds them")

    # the prompt
    chunking: str = setting(
        "ttft", "chunks of a prompt: of least predicted time to the first token, by either reading of the paper's "
        "rule, or none",
        choices=RULES,
    )  # fmt: skip
    shortest_chunk: int = setting(SHORTEST, "tokens of a chunk, at least", low=1)
    longest_chunk: int = setting(LONGEST, "tokens of a chunk, at most", low=1)


@dataclass
class CloudConfig:
    """What bounds the cloud."""

    capacity: int = setting(2048, "tokens of a request, prompt and answer, at most", low=2)
    cache_tokens: int = setting(65_536, "tokens of keys and values of all requests together", low=2)
    batch_tokens: int = setting(512, "rows of a batch, at most; 0: no limit", low=0)
    prompt_chunk: int = setting(0, "rows of one prompt in a batch, at most; 0: as devices send them", low=0)
    lease_s: float = setting(60.0, "seconds after which a silent device's requests are forgotten", low=0.1)


@dataclass
class TrainingConfig:
    """How devices train the adapter together."""

    rounds: int = setting(8, "of training; 0: none", low=0)
    steps: int = setting(40, "of the optimiser, on a device in a round", low=1)
    batch_size: int = setting(4, "sequences of a step", low=1)
    rate: float = setting(3e-2, "highest learning rate of AdamW, in the first round", low=0.0)
    token_weight: float = setting(0.1, "w_ce: weight of the cross-entropy in the loss", low=0.0)
    held_out: float = setting(0.125, "share of a device's sequences that it does not train on", low=0.0, high=0.9)
