"""What a round costs a device, for the virtual clock. All formulas are ours."""

from __future__ import annotations

from collections.abc import Collection

from fl_edge.pruning import Costs


def training_macs(costs: Costs, lora_parameters: int, token_counts: Collection[tuple[int, int]]) -> int:
    """Return the multiply-adds of forward and backward over batches of tokens.

    ::

        tokens * (2 C_block + 3 C_lora + 3 length * C_attention)

    A frozen linear map costs one pass forward and one for the gradient of its inputs; LoRA factors and attention have a
    third for the gradient of their own operands.

    Parameters
    ----------
    costs
        Of the pruned model.
    lora_parameters
        Which are LoRA's multiply-adds a token.
    token_counts
        (tokens, their sequences' length) of each batch, padding included.
    """
    per_token = 2 * costs.block_macs + 3 * lora_parameters
    return sum(tokens * (per_token + 3 * length * costs.attention_macs) for tokens, length in token_counts)


def round_seconds(compute_s: float, down_bytes: int, up_bytes: int, bandwidth_bps: float) -> float:
    """Return t_i = bytes_down / bw + compute + bytes_up / bw, in seconds; without a bandwidth, transfer is free."""
    return compute_s + (8 * (down_bytes + up_bytes) / bandwidth_bps if bandwidth_bps else 0.0)
