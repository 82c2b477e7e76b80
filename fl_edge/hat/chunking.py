"""How long the chunks of a prompt are, so that device compute, upload and the cloud's prefill overlap.

HAT: the chunk length X of a device balances the upload of a chunk, X A / beta, against wait and compute in the cloud,
with a division by the pipeline length P that the source leaves in two readings::

    r1:  X A / beta = w + g(mu + X) / P          r2:  X A / beta = (w + g(mu + X)) / P

*Ours*: w = g(mu) / (2 P), half a batch slot; the solver; what happens where there is no root; and the rule ``ttft``,
which minimises the predicted time to the first token itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

RULES = ("ttft", "r1", "r2", "none")
SHORTEST, LONGEST = 16, 512  # tokens: below, messages cost more than they hide; above, other devices' TBT suffers


@dataclass(frozen=True)
class Conditions:
    """What a device's chunk length depends on.

    Attributes
    ----------
    row_bytes
        A, bytes a token on the link.
    up
        beta, bytes a second to the cloud.
    delay
        g: tokens of a batch to seconds through the whole pipeline, never falling.
    background
        mu, tokens of other devices in a batch.
    stages
        P, length of the cloud's pipeline.
    message_s
        Seconds that each message costs beyond its bytes.
    input_s
        Seconds a token in the device's input submodel.
    """

    row_bytes: float
    up: float
    delay: Callable[[float], float]
    background: float = 0.0
    stages: int = 1
    message_s: float = 0.0
    input_s: float = 0.0

    @property
    def wait_s(self) -> float:
        """Expected wait for the next batch slot, w = g(mu) / (2 P)."""
        return self.delay(self.background) / (2 * self.stages)


def chunk_length(
    prompt: int, conditions: Conditions, rule: str = "ttft", shortest: int = SHORTEST, longest: int = LONGEST
) -> int:
    """Return the chunk length of a prompt.

    Parameters
    ----------
    prompt
        N, tokens, at least 1.
    conditions
        Of this device, now.
    rule
        One of :data:`RULES`; ``none`` is the whole prompt.
    shortest, longest
        X_min and X_max, tokens.

    Returns
    -------
    int
        X, between X_min and X_max, and never above N.
    """
    if rule == "none" or prompt <= shortest:
        return prompt
    longest = min(prompt, longest)
    if rule == "ttft":
        return _fastest(prompt, conditions, shortest, longest)
    return _balanced(conditions, rule, shortest, longest)


def _balanced(conditions: Conditions, rule: str, shortest: int, longest: int) -> int:
    """Return the first X from which on the upload of a chunk takes as long as the cloud needs for it.

    Every X is looked at, not a grid: then a faster link never makes chunks shorter. Where there is no such X, the link
    is faster than the cloud, short chunks would only pay the fixed cost of a batch more often, and X_max is taken.
    """
    stages, wait = conditions.stages, conditions.wait_s
    divided = wait / stages if rule == "r2" else wait
    before = 0.0
    for chunk in range(shortest, longest + 1):
        compute = conditions.delay(conditions.background + chunk) / stages
        gap = chunk * conditions.row_bytes / conditions.up - divided - compute
        if gap >= 0:
            return chunk if chunk == shortest or gap <= -before else chunk - 1
        before = gap
    return longest


def _fastest(prompt: int, conditions: Conditions, shortest: int, longest: int) -> int:
    """Return the X of least predicted TTFT among X_min, 2 X_min, .. and X_max; of equal ones the longest."""
    tried = [longest]
    chunk = shortest
    while chunk < longest:
        tried.append(chunk)
        chunk *= 2
    return min(tried, key=lambda each: (predicted_ttft(prompt, each, conditions), -each))


def predicted_ttft(prompt: int, chunk: int, conditions: Conditions) -> float:
    """Return the seconds from the start of a prompt to the end of its prefill in the cloud (ours).

    A chunk waits for the slowest of three overlapped streams (input submodel, upload, cloud). The last one then goes
    through the pipeline, behind the one before it. The answer's way back and the head, which no chunk length changes,
    are left out.

    Parameters
    ----------
    prompt
        N, tokens, at least 1.
    chunk
        X, tokens, at least 1.
    conditions
        Of this device, now.
    """
    token_s, message_s, input_s = conditions.row_bytes / conditions.up, conditions.message_s, conditions.input_s

    def arrival(before: int, length: int) -> float:
        """Return when a chunk of ``length`` after ``before`` chunks of X is in the cloud."""
        first, tokens = (chunk if before else length), before * chunk + length
        uploaded = first * input_s + tokens * token_s + (before + 1) * message_s
        return max(uploaded, tokens * input_s + length * token_s + message_s)

    full = (prompt - 1) // chunk  # chunks before the last
    rest = prompt - full * chunk
    start, tail = arrival(full, rest), conditions.delay(conditions.background + rest)
    if not full:
        return start + conditions.wait_s + tail
    compute = conditions.delay(conditions.background + chunk)
    slot = compute / conditions.stages
    previous = max(arrival(full - 1, chunk), arrival(0, chunk) + (full - 1) * slot)
    end = max(max(start, previous + slot) + tail, previous + compute + tail / conditions.stages)
    return end + conditions.wait_s


def chunks_of(prompt: int, chunk: int) -> list[int]:
    """Return the lengths of the chunks of a prompt, in order: ``chunk`` tokens, and what is left."""
    return [min(chunk, prompt - start) for start in range(0, prompt, chunk)]
