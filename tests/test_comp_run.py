"""COMP from folder to folder: what is written is what the steps give in memory, also after a kill; and faults."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers

from fl_edge.comp import output as output_module
from fl_edge.comp import state as state_module
from fl_edge.comp.run import RECORD, Result
from fl_edge.comp.state import STATE, keep_state, kept_state, run_key
from fl_edge.errors import ConfigError, DataError, RunFolderError
from fl_edge.pruning import load_pruned, read_plan
from fl_edge.pruning.pieces import write_pieces
from tests.tiny_comp import LAYERS, checkpoint_of, config, contents, draw_tokens, in_memory, run
from tests.tiny_transformers import DECODERS

SETTINGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "weights, biases, repaired": {"restore": "weights", "bias": True, "target": "stream", "repair": True},
    "layers by loss, channels only": {"layer_rule": "loss", "iterative_layers": True, "prune_attention": False},
}


class KilledError(BaseException):
    """In place of a signal."""


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("name", SETTINGS)
def test_the_folder_holds_what_the_steps_give_in_memory(family: str, name: str, tmp_path: Path) -> None:
    model, tokens, settings = checkpoint_of(tmp_path / "model", family), draw_tokens(), config(**SETTINGS[name])
    before = contents(model)
    result = run(model, tmp_path / "out", settings, tokens)
    found: Any = load_pruned(tmp_path / "out")
    expected = in_memory(model, settings, tokens)
    assert result.outline.removed
    assert found.state_dict().keys() == expected.state_dict().keys()
    for key, tensor in expected.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[key]), key
    with torch.no_grad():
        assert torch.equal(found(tokens).logits, expected(tokens).logits)
    assert result.after == sum(parameter.numel() for parameter in found.parameters())
    assert contents(model) == before
    assert not (tmp_path / "out" / STATE).exists()


def test_the_record_says_what_was_done(tmp_path: Path) -> None:
    model, tokens, settings = checkpoint_of(tmp_path / "model"), draw_tokens(), config()
    seen: list[tuple[int, int]] = []
    result = run(model, tmp_path / "out", settings, tokens, on_layer=lambda report, n: seen.append((report.layer, n)))
    assert seen == [(layer, LAYERS) for layer in range(LAYERS)]
    assert Result.read(tmp_path / "out") == result
    assert read_plan(tmp_path / "out") == result.plan
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["config"]["ratio"] == settings.ratio
    assert record["bytes_read"] > sum(file.stat().st_size for file in model.glob("*.safetensors"))
    assert record["peak_memory_bytes"]["resident"] > 2**20
    decoder = result.before - result.after
    full: Any = transformers.AutoModelForCausalLM.from_pretrained(model)
    layers = sum(parameter.numel() for parameter in full.model.layers.parameters())
    assert decoder / layers == pytest.approx(settings.ratio, abs=0.01)


def test_what_a_killed_process_was_writing_is_cleared_away(tmp_path: Path) -> None:
    model, tokens, settings = checkpoint_of(tmp_path / "model"), draw_tokens(), config()
    (tmp_path / "out").mkdir()
    left = tmp_path / "out" / ".shards.json.1.partial"
    left.write_text("half")
    run(model, tmp_path / "out", settings, tokens)
    assert not left.exists()


@pytest.mark.parametrize("same", [False, True])
def test_a_head_that_the_configuration_ties_is_kept_where_it_is_another(same: bool, tmp_path: Path) -> None:
    model, tokens, settings = checkpoint_of(tmp_path / "model"), draw_tokens(), config()
    if same:
        whole: Any = transformers.AutoModelForCausalLM.from_pretrained(model)
        with torch.no_grad():
            whole.lm_head.weight.copy_(whole.model.embed_tokens.weight)
        whole.save_pretrained(model, max_shard_size="40KB")
    file = model / "config.json"
    untied = run(model, tmp_path / "untied", settings, tokens)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    tied = run(model, tmp_path / "tied", settings, tokens)
    assert (tied.after < untied.after) == same
    found, expected = (load_pruned(tmp_path / name).eval() for name in ("tied", "untied"))
    with torch.no_grad():
        assert torch.equal(found(tokens).logits, expected(tokens).logits)


def test_where_widths_are_even_plain_transformers_loads_it_and_generates_with_a_cache(tmp_path: Path) -> None:
    model, tokens = checkpoint_of(tmp_path / "model"), draw_tokens()
    run(model, tmp_path / "out", config(ratio=0.5, layer_share=1.0), tokens)
    plain: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours: Any = load_pruned(tmp_path / "out")
    assert plain.config.num_hidden_layers == LAYERS // 2
    prompt = {"input_ids": tokens[:2, :5], "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    wanted = {"max_new_tokens": 6, "do_sample": False}
    cached = plain.generate(**prompt, **wanted, use_cache=True)
    assert torch.equal(cached, plain.generate(**prompt, **wanted, use_cache=False))
    assert torch.equal(cached, ours.generate(**prompt, **wanted))


@pytest.mark.parametrize("layers", [0, 1, LAYERS - 1])
def test_a_run_that_was_killed_goes_on_to_the_same_bits(
    layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens, settings = checkpoint_of(tmp_path / "model", "qwen3"), draw_tokens(), config(repair=True)
    run(model, tmp_path / "whole", settings, tokens)

    def kill(report: Any, _: int) -> None:
        if report.layer == layers:
            raise KilledError

    out = tmp_path / "out"
    with pytest.raises(KilledError):
        run(model, out, settings, tokens, on_layer=kill)
    assert not (out / "plan.json").exists()
    with pytest.raises(DataError):
        load_pruned(out)
    monkeypatch.setattr("fl_edge.comp.local.similarities", None)  # layers are not measured again
    seen: list[int] = []
    run(model, out, settings, tokens, on_layer=lambda report, _: seen.append(report.layer))
    assert seen == list(range(layers + 1, LAYERS))
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("step", ["layer", "outside", "finish"])
def test_a_kill_while_writing_changes_nothing(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens, settings = checkpoint_of(tmp_path / "model"), draw_tokens(), config()
    run(model, tmp_path / "whole", settings, tokens)
    done = getattr(output_module.Output, step)

    def killed(self: Any, *rest: Any) -> None:
        done(self, *rest)
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(output_module.Output, step, killed)
        with pytest.raises(KilledError):
            run(model, tmp_path / "out", settings, tokens)
    run(model, tmp_path / "out", settings, tokens)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_run_that_has_ended_is_not_done_again(tmp_path: Path) -> None:
    model, tokens, settings = checkpoint_of(tmp_path / "model"), draw_tokens(), config()
    result = run(model, tmp_path / "out", settings, tokens)
    assert run(model, tmp_path / "out", settings, tokens, on_layer=lambda *_: pytest.fail("again")) == result
    other = run(model, tmp_path / "out", config(ratio=0.2), tokens)
    assert other.after > result.after
    assert Result.read(tmp_path / "out") == other


def test_an_interrupted_run_of_other_settings_is_refused(tmp_path: Path) -> None:
    model, tokens = checkpoint_of(tmp_path / "model"), draw_tokens()
    keep_state(tmp_path / "out", run_key(model, config(), tokens), {}, {})
    with pytest.raises(RunFolderError, match="holds a run that was interrupted, with other settings"):
        run(model, tmp_path / "out", config(ratio=0.2), tokens)
    (tmp_path / "out" / STATE).write_bytes(b"no")
    with pytest.raises(RunFolderError, match="is damaged"):
        run(model, tmp_path / "out", config(), tokens)


def test_keys_name_all_that_a_run_depends_on(tmp_path: Path) -> None:
    model, tokens = checkpoint_of(tmp_path / "model"), draw_tokens()
    key = run_key(model, config(), tokens)
    assert key == run_key(model, config(), tokens.clone())
    others = [
        run_key(model, config(ratio=0.3), tokens),
        run_key(model, config(), tokens + 1),
        run_key(model, config(), tokens, "more"),
        run_key(checkpoint_of(tmp_path / "other", "mistral"), config(), tokens),
    ]
    assert len({key, *others}) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_comes_back_as_it_was(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"hidden": torch.randn(2, 3, 4).to(dtype)}
    keep_state(tmp_path, "key", {"scale": 0.1}, tensors)
    record, found = kept_state(tmp_path, "key") or ({}, {})
    assert record == {"scale": 0.1}
    assert torch.equal(found["hidden"], tensors["hidden"])
    assert kept_state(tmp_path / "none", "key") is None


def test_pieces_that_are_no_tensor_leave_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="8 bytes instead of 16"):
        write_pieces(tmp_path / "a.safetensors", {"a": (torch.float32, (4,))}, lambda _: [torch.zeros(2)])
    assert not list(tmp_path.iterdir())


class Fault(NamedTuple):
    prepare: Callable[[Path], Any]
    settings: dict[str, Any]
    error: type[Exception]
    message: str


def cut_short(model: Path) -> None:
    file = sorted(model.glob("*.safetensors"))[2]
    file.write_bytes(file.read_bytes()[:-20])


def other_kind(model: Path) -> None:
    record = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(record | {"model_type": "mamba"}))


FAULTS = {
    "unknown architecture": Fault(other_kind, {}, ConfigError, "has the architecture 'mamba'; known are"),
    "truncated shard": Fault(cut_short, {}, DataError, "is damaged or cut short"),
    "no such model": Fault(shutil.rmtree, {}, DataError, "is not the folder of a model"),
    "no plan meets the ratio": Fault(
        lambda _: None, {"ratio": 0.9, "layer_share": 0.0}, ConfigError, "would have to lose"
    ),
    "too many layers": Fault(lambda _: None, {"ratio": 0.9, "layer_share": 1.0}, ConfigError, "5 whole layers and 3"),
    "the guard": Fault(lambda _: None, {"max_variance": 1e-9}, DataError, "give more calibration text"),
    "a value out of range": Fault(lambda _: None, {"ratio": 1.5}, ConfigError, "ratio=1.5 is not allowed"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_one_line_and_leave_nothing_that_looks_whole(name: str, tmp_path: Path) -> None:
    fault, model, out = FAULTS[name], checkpoint_of(tmp_path / "model"), tmp_path / "out"
    fault.prepare(model)
    with pytest.raises(fault.error, match=fault.message) as raised:
        run(model, out, config(**fault.settings), draw_tokens())
    assert "\n" not in str(raised.value)
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize("inside", [".", "pruned", "../model/x"])
def test_the_models_own_folder_is_refused(inside: str, tmp_path: Path) -> None:
    model = checkpoint_of(tmp_path / "model")
    before = contents(model)
    with pytest.raises(ConfigError, match="is or lies in the folder of the model"):
        run(model, model / inside, config(), draw_tokens())
    assert contents(model) == before


def test_too_small_a_disk_is_said_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(RunFolderError, match=r"needs 0.\d MB and its disk has 0.0 MB free"):
        run(checkpoint_of(tmp_path / "model"), tmp_path / "out", config(), draw_tokens())


def test_a_disk_that_fills_up_is_one_line_and_the_run_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = checkpoint_of(tmp_path / "model"), draw_tokens()
    written, full = write_pieces, iter([False, False, True])

    def fills(*arguments: Any) -> None:
        if next(full):
            raise OSError(28, "No space left on device")
        written(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(state_module, "write_pieces", fills)
        with pytest.raises(RunFolderError, match="No space left on device"):
            run(model, tmp_path / "out", config(), tokens)
    assert not (tmp_path / "out" / "plan.json").exists()
    run(model, tmp_path / "out", config(), tokens)
    run(model, tmp_path / "whole", config(), tokens)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
