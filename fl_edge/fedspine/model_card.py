"""The model card of an exported model, as the Hugging Face hub reads it: YAML for programs, then text for people."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CARD = "README.md"

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_FIGURES = ("accuracy", "loss")
_SERVE = {
    "text-classification": """\
inputs = tokenizer([{example}], return_tensors="pt", return_token_type_ids=False)
logits = model(**inputs).logits
print([model.config.id2label[index] for index in logits.argmax(-1).tolist()])""",
    "text-generation": """\
inputs = tokenizer([{example}], return_tensors="pt", return_token_type_ids=False)
tokens = model.generate(**inputs, max_new_tokens=40)
print(tokenizer.decode(tokens[0], skip_special_tokens=True))""",
}
_RULES = {
    "masked_mean": "",
    "flexlora": "- FlexLoRA, [arXiv 2402.11505](https://arxiv.org/abs/2402.11505): aggregation\n",
    "rank_partitioned": "- raFLoRA, [arXiv 2602.13486](https://arxiv.org/abs/2602.13486): aggregation\n",
    "stacking": "- FLoRA, [arXiv 2409.05976](https://arxiv.org/abs/2409.05976): aggregation\n",
}
_TEXT = """\
# {title}

A transformer whose attention heads and FFN channels were pruned by {sparsity:.0%}, and tuned by LoRA, in federated
learning with `fl_edge` (FedSpine). The data stayed on {count} devices; {members} of them ended at this size.

## Figures

{figures}

Parameters are those of the base with its head, multiply-adds those of the linear maps in the blocks. The adapter, of
rank {rank}, adds {adapter_parameters:,} of either until `model.merge_and_unload()` has put it into the base.

## Load

```python
from pathlib import Path

from fl_edge.pruning import load_pruned
from transformers import AutoTokenizer

folder = Path("{folder}")  # where this file lies
model, tokenizer = load_pruned(folder), AutoTokenizer.from_pretrained(folder)
```

## Serve

```python
{serve}
```

## Training

{facts}

## Sources

- FedSpine, [arXiv 2501.02438](https://arxiv.org/abs/2501.02438). Only its abstract and notes on it were at hand:
  formulas that they do not give are those of `fl_edge`.
- LoRA, [arXiv 2106.09685](https://arxiv.org/abs/2106.09685)
- LoRAPrune, [arXiv 2305.18403](https://arxiv.org/abs/2305.18403): importance of heads and channels
{rule}"""


def model_card(row: Mapping[str, Any], task: str, rule: str, facts: Mapping[str, Any]) -> str:
    """Return the text of a model card.

    Parameters
    ----------
    row
        As :func:`~fl_edge.fedspine.export.export` returns it.
    task
        ``text-classification`` or ``text-generation``.
    rule
        By which adapters were aggregated.
    facts
        How the model was trained, by name; ``devices`` (number) is needed. The rest is optional: a mapping is shown as
        its pairs; ``base`` and ``data`` enter the YAML too, ``example`` is the text that the model is shown.
    """
    facts = dict(facts)
    example = json.dumps(facts.pop("example", "Return the sorted list of keys."), ensure_ascii=False)
    base = str(facts.get("base", ""))
    hub_name = base if _HUB_NAME.fullmatch(base) and not Path(base).exists() else None
    if base and hub_name is None:
        base = facts["base"] = Path(base).name  # where it lies on this machine is of no use elsewhere
    title = f"{base or 'Transformer'}, {row['sparsity']:.0%} pruned"
    measured = {name: row[name] for name in _FIGURES if name in row}
    table = [
        ("", "this model", "unpruned"),
        *((name, f"{value:.4f}", "") for name, value in measured.items()),
        ("sparsity of heads and channels", f"{row['sparsity']:.4f}", "0"),
        ("parameters", f"{row['parameters']:,}", f"{row['parameters_before']:,}"),
        ("multiply-adds a token", f"{row['macs']:,}", f"{row['macs_before']:,}"),
    ]
    text = _TEXT.format(
        title=title,
        sparsity=row["sparsity"],
        count=facts["devices"],
        members=row["devices"],
        figures=_table(table),
        adapter_parameters=row["adapter_parameters"],
        rank=row["rank"],
        folder=row["folder"],
        serve=_SERVE[task].format(example=example),
        facts=_table([("", ""), *((name, _value(value)) for name, value in facts.items())]),
        rule=_RULES[rule],
    )
    return f"---\n{_front(title, task, measured, hub_name, str(facts.get('data', '')))}\n---\n\n{text}"


def _front(title: str, task: str, measured: Mapping[str, float], base: str | None, data: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData  # noqa: PLC0415 - heavy

    results = [
        EvalResult(task, re.sub(r"\W+", "-", data.lower()).strip("-"), data, metric_type=name, metric_value=value)
        for name, value in measured.items()
        if data
    ]
    card = ModelCardData(
        library_name="peft",
        pipeline_tag=task,
        base_model=base,
        tags=["lora", "pruning", "federated-learning", "fl-edge", "fedspine"],
        model_name=title if results else None,
        eval_results=results or None,
    )
    return card.to_yaml().strip()


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    first, *others = ("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows)
    return "\n".join((first, "| " + " | ".join("---" for _ in rows[0]) + " |", *others))


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_value(each)}" for name, each in value.items())
    return " ".join(str(value).split())
