"""Pruned models on disk: bit-equal reloads, plain `from_pretrained`, killed saves, damaged files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fl_edge.errors import ConfigError, DataError, RunFolderError
from fl_edge.pruning import PruningPlan, full_plan, load_pruned, members, plain, prune, read_plan, save_pruned, saving
from tests.tiny_transformers import (
    DECODERS,
    FAMILIES,
    GROUPED,
    draw_batch,
    draw_plan,
    fill,
    logits,
    make_model,
    same_everywhere,
)

# peft asks transformers by a name that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
PLAIN = {
    "bare": transformers.AutoModel,
    "classification": transformers.AutoModelForSequenceClassification,
    "masked": transformers.AutoModelForMaskedLM,
    "causal": transformers.AutoModelForCausalLM,
}


def equal_bits(one: Any, other: Any) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name
    assert type(one) is type(other)
    batch = draw_batch(np.random.default_rng(0))
    assert torch.equal(logits(one, batch), logits(other, batch))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", ["classification", "language"])
def test_uneven_models_come_back_to_the_bit_and_only_by_the_one_call(family: str, task: str, tmp_path: Path) -> None:
    task = ("causal" if family in DECODERS else "masked") if task == "language" else task
    model = make_model(family, task)
    plan = draw_plan(model, np.random.default_rng(1), 0.5)
    prune(model, plan)
    save_pruned(model, plan, tmp_path / "new" / "folder")
    loaded = load_pruned(tmp_path / "new" / "folder")
    equal_bits(loaded, model)
    assert not loaded.training
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    assert read_plan(tmp_path / "new" / "folder") == plan
    assert full_plan(loaded).covers(plan)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        PLAIN[task].from_pretrained(tmp_path / "new" / "folder")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", ["bare", "language"])
def test_a_plan_that_the_configuration_can_say_loads_without_us(family: str, task: str, tmp_path: Path) -> None:
    task = ("causal" if family in DECODERS else "masked") if task == "language" else task
    model = make_model(family, task)
    heads = (1, 2) if family in GROUPED else (0, 1, 2, 3)
    plan = same_everywhere(model, heads, (0, 3, 4, 20, 21))
    prune(model, plan)
    save_pruned(model, plan, tmp_path)
    theirs = PLAIN[task].from_pretrained(tmp_path)
    equal_bits(theirs, model)
    ours = load_pruned(tmp_path)
    equal_bits(ours, model)
    further = same_everywhere(ours, heads[:1], (3, 4))
    prune(ours, further, present=plan)  # the loaded model still knows its unpruned sizes
    if task == "causal":
        asked = {**draw_batch(np.random.default_rng(2), 2, 5, left=True), "max_new_tokens": 6, "do_sample": False}
        assert torch.equal(theirs.generate(**asked), model.generate(**asked))


@pytest.mark.parametrize(
    ("family", "heads"),
    [("bert", (0, 2)), ("roberta", (3,)), ("distilbert", (0, 1, 2)), ("llama", (0, 1, 3))],  # 32 % 6: Llama refuses
)
def test_heads_that_the_configuration_cannot_say_keep_the_unpruned_sizes(
    family: str, heads: tuple[int, ...], tmp_path: Path
) -> None:
    model = make_model(family)
    plan = same_everywhere(model, heads, (0, 1))
    prune(model, plan)
    save_pruned(model, plan, tmp_path)
    equal_bits(load_pruned(tmp_path), model)
    written = transformers.AutoConfig.from_pretrained(tmp_path)
    assert written.num_attention_heads == model.config.num_attention_heads
    assert 24 in (getattr(written, "intermediate_size", 0), getattr(written, "hidden_dim", 0))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        PLAIN["classification"].from_pretrained(tmp_path)


def test_nothing_pruned_is_an_ordinary_folder(tmp_path: Path) -> None:
    model = make_model("qwen2", "causal")
    save_pruned(model, full_plan(model), tmp_path)
    equal_bits(PLAIN["causal"].from_pretrained(tmp_path), model)


@pytest.mark.parametrize(("family", "task"), [("qwen2", "causal"), ("bert", "masked"), ("llama", "causal")])
@pytest.mark.parametrize("even", [True, False])
def test_tied_weights_are_stored_once_and_tied_again(family: str, task: str, even: bool, tmp_path: Path) -> None:
    model = make_model(family, task, tie_word_embeddings=True)
    drawn = draw_plan(model, np.random.default_rng(3), 0.5)
    plan = same_everywhere(model, tuple(range(full_plan(model).heads[0])), (0, 5)) if even else drawn
    prune(model, plan)
    save_pruned(model, plan, tmp_path)
    loaded: Any = load_pruned(tmp_path)
    equal_bits(loaded, model)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert set(model.all_tied_weights_keys).isdisjoint(load_file(tmp_path / "model.safetensors"))
    if even:
        equal_bits(PLAIN[task].from_pretrained(tmp_path), model)


def test_types_labels_and_generation_settings_stay(tmp_path: Path) -> None:
    model = make_model("llama", "causal").to(torch.bfloat16)
    model.generation_config.max_new_tokens = 3
    model.config.id2label = {0: "no", 1: "yes", 2: "perhaps"}
    plan = draw_plan(model, np.random.default_rng(4), 0.5)
    prune(model, plan)
    save_pruned(model, plan, tmp_path)
    loaded: Any = load_pruned(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert loaded.generation_config.max_new_tokens == 3
    assert loaded.config.id2label == model.config.id2label
    equal_bits(loaded, model)


def adapted(seed: int, name: str = "default", family: str = "roberta", uneven: bool = True) -> tuple[Any, PruningPlan]:
    """A pruned model with an adapter and a task head, both drawn anew."""
    model = make_model(family)
    plan = draw_plan(model, np.random.default_rng(seed), 0.5) if uneven else same_everywhere(model, (0, 3), (0, 1))
    targets = [member.path for member in members(model)]
    config = peft.LoraConfig(r=3, task_type="SEQ_CLS", target_modules=targets)
    wrapped: Any = peft.get_peft_model(model, config, adapter_name=name)
    fill(torch.nn.ParameterList([p for p in wrapped.parameters() if p.requires_grad]), seed)
    prune(wrapped, plan)
    return wrapped.eval(), plan


@pytest.mark.parametrize("name", ["default", "mine"])
def test_an_adapter_is_saved_in_its_own_format_and_attached_again(name: str, tmp_path: Path) -> None:
    model, plan = adapted(5, name)
    save_pruned(model, plan, tmp_path)
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    loaded = load_pruned(tmp_path)
    assert isinstance(loaded, peft.PeftModel)
    batch = draw_batch(np.random.default_rng(6))
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    weights = load_file(tmp_path / "model.safetensors")
    assert not any("lora" in key or "base_layer" in key or "modules_to_save" in key for key in weights)
    base = model.unload()
    save_pruned(base, plan, tmp_path)  # over the old one, whose adapter must not be attached to this
    assert not isinstance(load_pruned(tmp_path), peft.PeftModel)


def test_the_adapter_of_an_even_model_fits_plain_peft_too(tmp_path: Path) -> None:
    model, plan = adapted(7, family="llama", uneven=False)
    save_pruned(model, plan, tmp_path)
    base = PLAIN["classification"].from_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    batch = draw_batch(np.random.default_rng(8))
    assert torch.equal(logits(theirs, batch), logits(model, batch))


def test_a_tokenizer_lies_beside_the_model(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "sparse": 1}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)  # type: ignore[no-untyped-call]
    model = make_model("bert")
    save_pruned(model, full_plan(model), tmp_path, tokenizer)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("sparse wood")["input_ids"] == [1, 0]


@pytest.mark.parametrize("step", ["save_file", "_write_adapter", "sha256_of", "write_whole"])
@pytest.mark.parametrize("before", [True, False])
def test_a_save_that_is_cut_short_looks_like_none(
    step: str, before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plan = adapted(9)
    if before:
        save_pruned(model, plan, tmp_path)

    def killed(*given: Any, **_: Any) -> None:
        if step == "save_file":
            given[1].write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(saving, step, killed)
    with pytest.raises(KeyboardInterrupt):
        save_pruned(model, plan, tmp_path)
    monkeypatch.undo()
    with pytest.raises(DataError, match="holds no pruned model, or its saving was cut short"):
        load_pruned(tmp_path)
    assert not list(tmp_path.glob(".*partial"))
    save_pruned(model, plan, tmp_path)
    load_pruned(tmp_path)


def failed(folder: Path, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        load_pruned(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("missing", ["plan.json", "config.json", "model.safetensors"])
def test_a_missing_file_is_one_line(missing: str, tmp_path: Path) -> None:
    model, plan = adapted(10)
    save_pruned(model, plan, tmp_path)
    (tmp_path / missing).unlink()
    failed(tmp_path, "no plan.json" if missing == "plan.json" else missing)
    failed(tmp_path / "nowhere", "no plan.json")


@pytest.mark.parametrize(
    "damaged", ["plan.json", "config.json", "model.safetensors", "adapter/adapter_model.safetensors"]
)
@pytest.mark.parametrize("how", ["empty", "half", "flipped"])
def test_a_damaged_file_is_one_line(damaged: str, how: str, tmp_path: Path) -> None:
    model, plan = adapted(11)
    save_pruned(model, plan, tmp_path)
    content = bytearray((tmp_path / damaged).read_bytes())
    if how == "flipped":
        content[content.index(b":") if damaged.endswith(".json") else 5] ^= 0x55
    (tmp_path / damaged).write_bytes(
        {"empty": b"", "half": bytes(content[: len(content) // 2])}.get(how, bytes(content))
    )
    failed(tmp_path, damaged.replace("/adapter_model.safetensors", ""))


def test_one_flipped_bit_in_the_weights_is_found(tmp_path: Path) -> None:
    model, plan = adapted(12)
    save_pruned(model, plan, tmp_path)
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    failed(tmp_path, "model.safetensors is damaged or not the file that plan.json belongs to")


def rewrite(folder: Path, **changes: Any) -> None:
    record = json.loads((folder / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps({**record, **changes}))


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    model, plan = adapted(13)
    save_pruned(model, plan, tmp_path)
    other = draw_plan(make_model("roberta"), np.random.default_rng(99), 0.5)
    rewrite(tmp_path, plan=other.to_record())
    failed(tmp_path, "model.safetensors does not fit plan.json: it has ")
    rewrite(tmp_path, plan={**plan.to_record(), "model_type": "bert"})
    failed(tmp_path, "is of a 'roberta' model, plan.json of a 'bert' one")
    rewrite(tmp_path, plan={**plan.to_record(), "kept_heads": ["0", "f"]})
    failed(tmp_path, "plan.json is damaged: the pruning plan leaves layer 0 no heads")
    longer = {key: [*value, value[0]] for key, value in plan.to_record().items() if key != "model_type"}
    rewrite(tmp_path, plan={"model_type": "roberta", **longer})
    failed(tmp_path, "does not fit its plan.json: the plan is one of another model")
    save_pruned(model, plan, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["Popen"]}))
    failed(tmp_path, "the architecture 'Popen', which transformers does not have")
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 9}))
    failed(tmp_path, "it has .64, 32. for roberta.embeddings.word_embeddings.weight, the plan .9, 32.")


def test_weights_with_too_much_or_too_little_are_refused(tmp_path: Path) -> None:
    model = make_model("distilbert", "bare")
    save_pruned(model, full_plan(model), tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    name = "transformer.layer.0.ffn.lin1.weight"
    for changed, said in (
        ({key: value for key, value in weights.items() if key != name}, "has nothing for transformer.layer.0.ffn.lin1"),
        ({**weights, "more": torch.zeros(2)}, "has .2,. for more, the plan nothing"),
    ):
        save_file(changed, file)
        rewrite(tmp_path, weights_sha256={file.name: saving.sha256_of(file)})
        failed(tmp_path, said)


def test_an_adapter_of_another_plan_is_refused(tmp_path: Path) -> None:
    for seed, folder in ((14, "one"), (15, "other")):
        save_pruned(*adapted(seed), tmp_path / folder)
    (tmp_path / "one" / "adapter").rename(tmp_path / "kept")
    (tmp_path / "other" / "adapter").rename(tmp_path / "one" / "adapter")
    failed(tmp_path / "one", "adapter is damaged or of another model")


def test_what_cannot_be_saved_is_refused_before_anything_is_removed(tmp_path: Path) -> None:
    model, plan = adapted(16)
    save_pruned(model, plan, tmp_path)
    with pytest.raises(ConfigError, match="by the plan of what is present"):
        save_pruned(model, full_plan(model), tmp_path)
    model.merge_adapter()
    with pytest.raises(ConfigError, match="merged into the weights; call unmerge_adapter"):
        save_pruned(model, plan, tmp_path)
    model.unmerge_adapter()
    with pytest.raises(ConfigError, match="holds adapters without being a PeftModel"):
        save_pruned(plain(model), plan, tmp_path)
    load_pruned(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"cannot write .*file"):
        save_pruned(model, plan, tmp_path / "file")
