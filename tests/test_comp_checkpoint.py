"""Streamed layer by layer against transformers' own whole model: hidden states, likelihoods, bytes read, and faults."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks import comp_shapes
from fl_edge.comp import checkpoint as checkpoint_module
from fl_edge.comp.checkpoint import Checkpoint
from fl_edge.errors import ConfigError, DataError, FlEdgeError
from fl_edge.seeding import torch_rng
from tests.tiny_transformers import DECODERS, VOCABULARY, make_model

CPU = torch.device("cpu")
SLIDING: dict[str, Any] = {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral, windows on all layers": ("mistral", {"sliding_window": 4}),
    "qwen2, windows on some layers": ("qwen2", SLIDING),
    "qwen3, windows on some layers": ("qwen3", SLIDING),
    "llama, tied head": ("llama", {"tie_word_embeddings": True}),
    "llama, tables that grow with the length": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}, "max_position_embeddings": 8},
    ),
    "opt, head of its own": ("opt", {"tie_word_embeddings": False}),
    "opt, as 350m": ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "bert as a decoder": ("bert", {"is_decoder": True}),
    "roberta as a decoder": ("roberta", {"is_decoder": True}),
}


def save(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    make_model(family, "causal", **changes).to(dtype).save_pretrained(folder, max_shard_size="9KB")
    return folder


def draw_tokens(sequences: int = 3, length: int = 12) -> Tensor:
    return torch.randint(2, VOCABULARY, (sequences, length), generator=torch_rng(1, "tokens", sequences, length))


def stream(checkpoint: Checkpoint, tokens: Tensor) -> list[Tensor]:
    """What enters each layer, and what leaves the last."""
    states = [checkpoint.embed(tokens)]
    for layer in range(checkpoint.num_layers):
        checkpoint.load(layer)
        states.append(checkpoint.run(layer, states[-1]))
        checkpoint.release(layer)
    return states


@torch.no_grad()
def reference(folder: Path, tokens: Tensor, dtype: torch.dtype | None = None) -> tuple[list[Tensor], Tensor, Tensor]:
    """Transformers' own: what enters each layer, logits in float32, likelihoods."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
    found = model(tokens, output_hidden_states=True, use_cache=False)
    logits = found.logits.float()
    likely = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return list(found.hidden_states[:-1]), logits, -likely  # the last hidden states are those after the final norm


def assert_parity(folder: Path, tokens: Tensor, dtype: torch.dtype | None = None) -> None:
    checkpoint = Checkpoint(folder, CPU, dtype)
    states = stream(checkpoint, tokens)
    expected, logits, nll = reference(folder, tokens, dtype)
    assert len(states) == len(expected) + 1
    for ours, theirs in zip(states[:-1], expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    # the head sees other numbers of tokens at once than theirs does, so its sums may round otherwise
    rounding = float(logits.abs().max()) * (2**-7 if states[0].dtype == torch.bfloat16 else 1e-6)
    found = checkpoint.nll(states[-1], tokens)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, nll, atol=rounding, rtol=1e-6)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streaming_is_the_whole_model(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save(tmp_path, family, dtype)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_parity(tmp_path, draw_tokens())


@pytest.mark.parametrize("variant", VARIANTS)
def test_streaming_hands_each_layer_its_own_masks_and_positions(variant: str, tmp_path: Path) -> None:
    family, changes = VARIANTS[variant]
    assert_parity(save(tmp_path, family, **changes), draw_tokens())


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_windows_are_shorter_than_the_sequences_here(family: str, tmp_path: Path) -> None:
    tokens = draw_tokens()
    wide = reference(save(tmp_path / "wide", family), tokens)
    narrow = reference(save(tmp_path / "narrow", family, **SLIDING), tokens)
    assert not torch.allclose(wide[1], narrow[1], atol=1e-3)


def test_one_file_is_read_like_many(tmp_path: Path) -> None:
    make_model("qwen2", "causal").save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    assert_parity(tmp_path, draw_tokens())


def test_another_type_than_that_of_the_files(tmp_path: Path) -> None:
    assert_parity(save(tmp_path), draw_tokens(), torch.bfloat16)
    assert Checkpoint(tmp_path, CPU, torch.bfloat16).skeleton.dtype == torch.bfloat16


def test_the_type_is_that_of_most_numbers(tmp_path: Path) -> None:
    make_model("llama", "causal").to(torch.bfloat16).save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda found: {k: v.float() if v.ndim == 1 else v for k, v in found.items()})
    checkpoint = Checkpoint(tmp_path, CPU)
    assert checkpoint.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in checkpoint.load(0).state_dict().values()} == {torch.bfloat16}


def test_a_head_of_its_own_is_taken_although_the_configuration_ties_it(tmp_path: Path) -> None:
    save(tmp_path)
    edit_config(tmp_path, tie_word_embeddings=True)
    assert_parity(tmp_path, draw_tokens())


def test_lengths_may_change_between_layers(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save(tmp_path, "qwen3", **SLIDING), CPU)
    for layer in range(2):
        checkpoint.load(layer)
    long, short = draw_tokens(2, 14), draw_tokens(4, 6)
    states = [checkpoint.embed(long), checkpoint.embed(short)]
    for layer in range(2):
        states = [checkpoint.run(layer, hidden) for hidden in states]
    for tokens, hidden in zip((long, short), states, strict=True):
        torch.testing.assert_close(checkpoint.nll(hidden, tokens), reference(tmp_path, tokens)[2])


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("at_once", [1, 5, 11])
def test_likelihoods_do_not_depend_on_how_many_logits_fit(
    family: str, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, tokens = Checkpoint(save(tmp_path, family), CPU), draw_tokens()
    hidden = stream(checkpoint, tokens)[-1]
    monkeypatch.setattr(checkpoint_module, "LOGITS_BYTES", at_once * VOCABULARY * 10)
    seen: list[int] = []
    head = checkpoint.skeleton.get_output_embeddings()
    head.register_forward_hook(lambda _module, _inputs, logits: seen.append(logits[..., 0].numel()))
    torch.testing.assert_close(checkpoint.nll(hidden, tokens), reference(tmp_path, tokens)[2])
    assert max(seen) == at_once
    assert sum(seen) == 3 * 11


def test_sequences_of_one_token_have_no_next_one(tmp_path: Path) -> None:
    checkpoint, tokens = Checkpoint(save(tmp_path), CPU), draw_tokens(2, 1)
    assert checkpoint.nll(stream(checkpoint, tokens)[-1], tokens).shape == (2, 0)


def test_only_loaded_layers_are_in_memory(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save(tmp_path), CPU)

    def present() -> set[str]:
        return {name for name, tensor in checkpoint.skeleton.named_parameters() if not tensor.is_meta}

    assert not checkpoint.skeleton.training
    assert not present()
    assert not any(buffer.is_meta for buffer in checkpoint.skeleton.buffers())
    block = checkpoint.load(1)
    assert block is checkpoint.skeleton.model.layers[1]
    assert present() == {f"model.layers.1.{name}" for name, _ in block.named_parameters()}
    assert not any(parameter.requires_grad for parameter in block.parameters())
    tokens = draw_tokens()
    checkpoint.nll(checkpoint.run(1, checkpoint.embed(tokens)), tokens)
    assert present() == {f"model.layers.1.{name}" for name, _ in block.named_parameters()}
    checkpoint.release(1)
    assert not present()
    assert all(parameter.is_meta for parameter in block.parameters())
    with pytest.raises(KeyError):
        checkpoint.run(1, checkpoint.embed(tokens))


def test_what_was_done_to_a_block_does_not_come_back(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save(tmp_path), CPU)
    block: Any = checkpoint.load(0)
    whole = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    for linear in (block.mlp.gate_proj, block.mlp.up_proj):
        linear.weight = nn.Parameter(linear.weight[:5], requires_grad=False)
    block.mlp.down_proj.weight = nn.Parameter(block.mlp.down_proj.weight[:, :5], requires_grad=False)
    assert checkpoint.run(0, checkpoint.embed(draw_tokens())).shape == (3, 12, 32)  # a sliced block runs
    checkpoint.release(0)
    assert checkpoint.skeleton.model.layers[0].mlp.gate_proj.weight.shape == (24, 32)
    again = checkpoint.load(0).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_blocks_may_return_tuples(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save(tmp_path), CPU)
    block, hidden = checkpoint.load(0), checkpoint.embed(draw_tokens())
    expected, forward = checkpoint.run(0, hidden), block.forward
    block.forward = lambda *places, **names: (forward(*places, **names), None)
    assert torch.equal(checkpoint.run(0, hidden), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_read_are_exact(tied: bool, tmp_path: Path) -> None:
    dtype = torch.bfloat16
    checkpoint = Checkpoint(save(tmp_path, "llama", dtype, tie_word_embeddings=tied), CPU, torch.float32)
    tokens = torch.tensor([[3, 5, 3, 60], [60, 3, 3, 7]])  # four different ones
    counted: list[int] = []

    def count(work: Callable[[], Any]) -> Any:
        before, found = checkpoint.bytes_read, work()
        counted.append(checkpoint.bytes_read - before)
        return found

    assert checkpoint.bytes_read == 0
    hidden = count(lambda: checkpoint.embed(tokens))
    block = count(lambda: checkpoint.load(0))
    hidden = count(lambda: checkpoint.run(0, hidden))
    count(lambda: checkpoint.run(0, hidden[:, :2]))
    count(lambda: checkpoint.nll(hidden, tokens))
    layer = 2 * sum(parameter.numel() for parameter in block.parameters())
    norm, row = 2 * 32, 2 * 32
    assert counted == [4 * row + norm, layer, 0, norm, VOCABULARY * row + norm]


def test_no_graph_is_built(tmp_path: Path) -> None:
    checkpoint, tokens = Checkpoint(save(tmp_path), CPU), draw_tokens()

    def kept(tensor: Tensor) -> Tensor:
        raise AssertionError("something is kept for a backward pass")

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
        checkpoint.load(0)
        for hidden in (checkpoint.embed(tokens), torch.ones(3, 12, 32, requires_grad=True)):
            for found in (hidden, checkpoint.run(0, hidden), checkpoint.nll(hidden, tokens)):
                assert found.grad_fn is None
        assert torch.is_grad_enabled()
    assert not any(parameter.requires_grad for parameter in checkpoint.skeleton.parameters())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped")
def test_no_file_stays_mapped_or_open(tmp_path: Path) -> None:
    checkpoint, tokens = Checkpoint(save(tmp_path), CPU), draw_tokens()
    checkpoint.load(0)
    checkpoint.nll(checkpoint.run(0, checkpoint.embed(tokens)), tokens)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text(encoding="utf-8")
    opened = [str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    assert not any(str(tmp_path) in name for name in opened)


def test_the_source_is_not_touched(tmp_path: Path) -> None:
    def state() -> dict[str, tuple[str, int]]:
        return {
            file.name: (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns)
            for file in save_folder.iterdir()
        }

    save_folder = save(tmp_path)
    before = state()
    checkpoint, tokens = Checkpoint(save_folder, CPU), draw_tokens()
    block = checkpoint.load(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
    checkpoint.nll(checkpoint.run(0, checkpoint.embed(tokens)), tokens)
    assert state() == before


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    for file in folder.glob("*.safetensors"):
        changed = change(load_file(file))  # mapped: written beside, then moved
        save_file(changed, folder / "new", {"format": "pt"})
        (folder / "new").replace(file)


def remove_weights(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()


def pickled(folder: Path) -> None:
    remove_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")


def lead_out(folder: Path) -> None:
    first_shard(folder).replace(folder.parent / "secret.safetensors")
    edit_index(folder, '{"weight_map": {"a": "../secret.safetensors"}}')


def edit_index(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def cut(folder: Path, keep: int) -> None:
    shard = first_shard(folder)
    shard.write_bytes(shard.read_bytes()[:keep])


FAULTS: dict[str, tuple[Callable[[Path], Any], type[FlEdgeError], str]] = {
    "no configuration": (lambda at: (at / "config.json").unlink(), DataError, r"no config\.json"),
    "configuration is no JSON": (
        lambda at: (at / "config.json").write_text("{"),
        DataError,
        r"config\.json is damaged",
    ),
    "configuration is a list": (
        lambda at: (at / "config.json").write_text("[]"),
        DataError,
        r"config\.json is damaged",
    ),
    "kind is a list": (lambda at: edit_config(at, model_type=[]), DataError, r"config\.json is damaged"),
    "a size is a text": (lambda at: edit_config(at, hidden_size="wide"), DataError, r"config\.json (is damaged|makes)"),
    "a size is zero": (
        lambda at: edit_config(at, num_attention_heads=0),
        DataError,
        r"config\.json (is damaged|makes)",
    ),
    "no layers": (lambda at: edit_config(at, num_hidden_layers=0), DataError, r"config\.json makes no model"),
    "unknown activation": (lambda at: edit_config(at, hidden_act="sigh"), DataError, r"config\.json makes no model"),
    "unknown here": (lambda at: edit_config(at, model_type="gpt2"), ConfigError, "'gpt2'; known are bert, .*llama"),
    "unknown to all": (lambda at: edit_config(at, model_type="nobody"), ConfigError, "'nobody'; known are bert"),
    "quantised": (
        lambda at: edit_config(at, quantization_config={"quant_method": "gptq", "bits": 4}),
        DataError,
        r"config\.json is of a quantised model",
    ),
    "no weights": (remove_weights, DataError, r"holds no weights: neither model\.safetensors nor"),
    "pickled": (pickled, DataError, "pickled weights, which are never read.*safetensors"),
    "index is no JSON": (lambda at: edit_index(at, "{"), DataError, r"index\.json is damaged"),
    "index without a map": (lambda at: edit_index(at, "{}"), DataError, r"index\.json is damaged"),
    "index names numbers": (
        lambda at: edit_index(at, '{"weight_map": {"a": 1}}'),
        DataError,
        r"index\.json is damaged",
    ),
    "index leads out of the folder": (lead_out, DataError, r"index\.json names \.\./secret"),
    "a shard is missing": (lambda at: first_shard(at).unlink(), DataError, r"index\.json names model-00001-of"),
    "a shard is cut short": (lambda at: cut(at, -1), DataError, r"model-00001-of-.* is damaged or cut short"),
    "a shard is cut in its header": (lambda at: cut(at, 20), DataError, r"model-00001-of-.* is damaged or cut short"),
    "a shard is empty": (lambda at: cut(at, 0), DataError, r"model-00001-of-.* is damaged or cut short"),
    "a tensor is missing": (
        lambda at: edit_weights(at, lambda found: {k: v for k, v in found.items() if "layers.1.mlp.up" not in k}),
        DataError,
        r"no tensor model\.layers\.1\.mlp\.up_proj\.weight",
    ),
    "the head is missing": (
        lambda at: edit_weights(at, lambda found: {k: v for k, v in found.items() if "lm_head" not in k}),
        DataError,
        r"no tensor lm_head\.weight",
    ),
    "a tensor is too small": (
        lambda at: edit_weights(at, lambda found: {k: v[:-1] if "1.mlp.up" in k else v for k, v in found.items()}),
        DataError,
        r"safetensors has \(23, 32\) for .*config\.json asks for \(24, 32\)",
    ),
    "a tensor of integers": (
        lambda at: edit_weights(at, lambda found: {k: v.char() if "1.mlp.up" in k else v for k, v in found.items()}),
        DataError,
        r"safetensors holds I8 tensors; weights must be one of F64, F32, F16, BF16",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_one_line_that_names_the_file(fault: str, tmp_path: Path) -> None:
    (break_it, kind, says), folder = FAULTS[fault], tmp_path / "model"
    break_it(save(folder))
    with pytest.raises(kind, match=says) as caught:
        Checkpoint(folder, CPU)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(("family", "task"), [("bert", "masked"), ("roberta", "masked"), ("distilbert", "bare")])
def test_encoders_are_refused(family: str, task: str, tmp_path: Path) -> None:
    make_model(family, task).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"config\.json: '{family}'.*causal decoder"):
        Checkpoint(tmp_path, CPU)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is not the folder of a model"):
        Checkpoint(tmp_path / "nowhere", CPU)


@pytest.mark.parametrize("change", [lambda file: file.unlink(), lambda file: file.write_bytes(file.read_bytes()[:-4])])
def test_a_shard_that_is_lost_on_the_way(change: Callable[[Path], Any], tmp_path: Path) -> None:
    checkpoint = Checkpoint(save(tmp_path), CPU)
    for file in tmp_path.glob("*.safetensors"):
        change(file)
    with pytest.raises(DataError, match=r"cannot read model\.layers\.0\..* from .*safetensors"):
        checkpoint.load(0)
    with pytest.raises(DataError, match=r"cannot read model\.embed_tokens\.weight from .*safetensors"):
        checkpoint.embed(draw_tokens())


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_tokens_out_of_the_vocabulary(token: int, tmp_path: Path) -> None:
    checkpoint = Checkpoint(save(tmp_path), CPU)
    with pytest.raises(DataError, match=rf"tokens must be 0 to {VOCABULARY - 1} .*got .*{token}"):
        checkpoint.embed(torch.tensor([[2, token]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_made_checkpoints_are_what_transformers_reads(dtype: torch.dtype, tmp_path: Path) -> None:
    comp_shapes.make_checkpoint(tmp_path / "one", "tiny", dtype)
    comp_shapes.make_checkpoint(tmp_path / "other", "tiny", dtype)
    comp_shapes.make_checkpoint(tmp_path / "seed", "tiny", dtype, seed=1)
    shards = sorted(file.name for file in (tmp_path / "one").glob("*.safetensors"))
    assert len(shards) == 1 + 3
    for name in shards:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
        assert (tmp_path / "one" / name).read_bytes() != (tmp_path / "seed" / name).read_bytes()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert type(model) is transformers.LlamaForCausalLM
    assert model.dtype == dtype
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            assert torch.linalg.matrix_rank(parameter.detach().float()) == min(parameter.shape), name
            assert 0.015 < float(parameter.detach().float().std()) < 0.025
        else:
            assert torch.equal(parameter, torch.ones_like(parameter))
    maps = [layer.mlp.up_proj.weight for layer in model.model.layers]
    assert not any(torch.equal(maps[0], other) for other in maps[1:])
    assert_parity(tmp_path / "one", draw_tokens())


def test_shapes_have_the_parameters_of_their_names() -> None:
    build: Any = transformers.AutoModelForCausalLM.from_config
    sizes = {}
    for shape, settings in comp_shapes.SHAPES.items():
        with torch.device("meta"):
            sizes[shape] = build(transformers.AutoConfig.for_model(**settings)).num_parameters()
    assert sizes["tinyllama-1.1b"] == 1_100_048_384
    assert sizes["llama-2-7b"] == 6_738_415_616
