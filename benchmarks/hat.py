"""HAT: the unsplit model's text, TTFT and TBT over paced links, the paper's rows, accept length, cloud, memory.

Parts, each in a module of its own that says what is compared with what, and how:

* *exact*, *float32*: text against ``generate`` of the unsplit model (:mod:`benchmarks.hat_exact`);
* *sampling*: chi-square against the unsplit model's probabilities (:mod:`benchmarks.hat_sampling`);
* *accept*: accept length and trained parameters, adapter and Medusa's heads (:mod:`benchmarks.hat_accept`);
* *cloud*: verification rows a second, 16 devices (:mod:`benchmarks.hat_cloud`);
* *memory*: what a device holds (:mod:`benchmarks.hat_memory`);
* *paper*, *measured drafts*: the virtual clock (:mod:`benchmarks.hat_virtual`);
* *real*: TTFT and TBT in real seconds, HAT and its baselines (:mod:`benchmarks.hat_real`).

On a GPU the cloud's case has 7B- and 13B-shaped models, and memory is the device's::

    python -m benchmarks hat --device cuda
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import hat_real
from benchmarks.harness import Benchmark, Case, Column, Results, Target
from benchmarks.hat_accept import DRAFTS, OURS, accept_case, measure_accept
from benchmarks.hat_cloud import DEVICE, LOADS, MODELS, cloud_case, measure_cloud
from benchmarks.hat_exact import MODES, exact_case, measure_exact, measure_single, single_case
from benchmarks.hat_figure import figure
from benchmarks.hat_memory import WHO, measure_memory, memory_case
from benchmarks.hat_models import FAMILIES, adapter_file, model_folder
from benchmarks.hat_sampling import LAWS, measure_sampling, sampling_case
from benchmarks.hat_sampling import MODES as SAMPLED
from benchmarks.hat_virtual import OWN_METHODS, SETTINGS, measure_own, measure_row, own_case, row_case, row_of
from fl_edge.hat.simulated_report import ROWS, WITHIN

# What is measured under which name; the real run comes last, so that all else is there if it is interrupted.
MEASURES: dict[str, Callable[[bool], Mapping[str, Any]]] = {
    **{exact_case(family, mode): partial(measure_exact, family, mode) for family in FAMILIES for mode in MODES},
    **{single_case(family): partial(measure_single, family) for family in FAMILIES},
    **{sampling_case(mode, law): partial(measure_sampling, mode, law) for law in LAWS for mode in SAMPLED},
    **{accept_case(drafts): partial(measure_accept, drafts) for drafts in DRAFTS},
    **{memory_case(who): partial(measure_memory, who) for who in WHO},
    **{row_case(number): partial(measure_row, number) for number in range(len(ROWS))},
    **{own_case(name, method): partial(measure_own, name, method) for name in SETTINGS for method in OWN_METHODS},
    **{cloud_case(model, load): partial(measure_cloud, model, load) for model in MODELS for load in LOADS},
}
LEAST_LENGTH, LEAST_SHARE, LEAST_P = 2.06, 0.8, 0.01


def measure(case: str, seed: int, quick: bool) -> Mapping[str, Any]:
    """Measure one case once; only the real run depends on the seed."""
    return MEASURES[case](quick) if case in MEASURES else hat_real.measure(case, seed, quick)


def prepare(seeds: Sequence[int], quick: bool) -> None:  # noqa: ARG001
    """Train what is not there yet, and start the processes of the real run."""
    torch.set_num_threads(1)
    for family in FAMILIES:
        model_folder(family, quick)
        adapter_file(family, quick)
    hat_real.prepare(quick)


def targets(results: Results) -> list[Target]:
    """Return the issue's lines."""
    lines = [_exactness(results), *_sampling(results), *hat_real.targets(results), *_virtual(results)]
    length = results.center(accept_case(OURS), "accept_length")
    lines.append(Target.at_least(f"accept length on held-out text, {OURS}", length, LEAST_LENGTH))
    middle = results.center(memory_case("device"), "middle_mb")
    lines.append(Target.at_most("MB of the middle's tensors that a device reads", middle, 0))
    for model in MODELS:
        for load in LOADS:
            share = results.center(cloud_case(model, load), "of_bare")
            lines.append(Target.at_least(f"{cloud_case(model, load)}: rows a second / bare", share, LEAST_SHARE))
    return lines


def _exactness(results: Results) -> Target:
    cases = [exact_case(family, mode) for family in FAMILIES for mode in MODES]
    shares = [results.center(case, key) for case in cases for key in ("alone", "together")]
    known = [each for each in shares if each is not None]
    value = min(known) if len(known) == len(shares) else None
    return Target.at_least("identical tokens, least share of all families and modes", value, 1)


def _sampling(results: Results) -> list[Target]:
    lines = []
    for law in LAWS:
        found = [results.center(sampling_case(mode, law), "p") for mode in SAMPLED]
        known = [each for each in found if each is not None]
        value = min(known) if len(known) == len(found) else None
        lines.append(Target.at_least(f"sampling, {law}: least p of chi-square over modes", value, LEAST_P))
    return lines


def _virtual(results: Results) -> list[Target]:
    """Return one line for all rows, and one for each that is off."""
    cases = {row_case(number): results.center(row_case(number), "off") for number in range(len(ROWS))}
    known = {case: off for case, off in cases.items() if off is not None}
    within = sum(abs(off) <= WITHIN for off in known.values()) if len(known) == len(cases) else None
    set_on = sum(row.set_on for row in ROWS)
    measure = f"virtual clock: rows of the paper within {WITHIN:.0%}, {set_on} of them set on"
    lines = [Target.at_least(measure, within, len(cases))]
    for case, off in known.items():
        if abs(off) > WITHIN:
            paper = row_of(case).paper
            lines.append(Target.at_most(f"{case} ({paper:g}): off, see fl_edge.hat.simulated_report", abs(off), WITHIN))
    return lines


BENCHMARK = Benchmark(
    cases=(*map(Case, MEASURES), *hat_real.CASES),
    columns={
        "tokens": Column("tokens", digits=0),
        "alone": Column("identical, alone", digits=4),
        "together": Column("identical, batched", digits=4),
        "same_texts": Column("same texts"),
        "gap": Column("widest gap of logits", digits=6),
        "p": Column("p"),
        "p_hotter": Column("p against 10 % hotter", digits=4),
        "same_draws": Column("draws as without drafts"),
        "accept_length": Column("accept length", digits=2),
        "drafted": Column("drafts a round", digits=2),
        "agreement": Column("agreement"),
        "overlap": Column("overlap"),
        "trained": Column("trained", digits=0),
        "ours_ms": Column("cloud", "real_ms", 1),
        "bare_ms": Column("bare forward", "real_ms", 1),
        "rows_s": Column("rows a second", digits=0),
        "of_bare": Column("of bare"),
        "prompt_ms": Column("prompt of 512", "real_ms", 1),
        "above_mb": Column("MB above imports", digits=0),
        "read_mb": Column("MB read", digits=0),
        "middle_mb": Column("of the middle", digits=0),
        **({} if DEVICE.type == "cpu" else {"device_mb": Column("device MB", digits=0)}),
        "paper": Column("paper", digits=2),
        "simulated": Column("simulated", digits=2),
        "off": Column("off"),
        "virtual_ttft_s": Column("TTFT", "virtual_s"),
        "virtual_tbt_s": Column("TBT", "virtual_s", 4),
        **{name: column for name, column in hat_real.COLUMNS.items() if name != "accept_length"},
    },
    measure=measure,
    targets=targets,
    figure=figure,
    prepare=prepare,
    settings={"device": str(DEVICE), "real": hat_real.SETTINGS},
    packages=("transformers",),
)
