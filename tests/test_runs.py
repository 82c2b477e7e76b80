"""What a run leaves on disk: whole files, checkpoints, the run folder."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fl_edge.checkpoints import load_checkpoint, save_checkpoint
from fl_edge.errors import RunFolderError
from fl_edge.files import write_whole
from fl_edge.mergesfl.report import summarise
from fl_edge.observers import Recorder
from fl_edge.runs import RunFolder, saved_config, versions
from tests.tiny import same_bits
from tests.tiny_report import report


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# ---------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
def test_a_failed_write_leaves_the_old_content_and_no_part_of_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    file = tmp_path / "kept.txt"
    write_whole(file, "old")
    monkeypatch.setattr(step, full_disk)
    with pytest.raises(RunFolderError, match=r"kept\.txt: No space left on device"):
        write_whole(file, "new, and longer than what stood there")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_write_that_never_came_back_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is killed between writing and replacing: nothing of ours runs any more."""

    class Killed(BaseException):
        pass

    def kill(_: int) -> None:
        raise Killed

    file = tmp_path / "rounds.jsonl"
    write_whole(file, b"old")
    monkeypatch.setattr(os, "fsync", kill)
    with pytest.raises(Killed):
        write_whole(file, b"new")
    monkeypatch.undo()
    assert file.read_bytes() == b"old"
    write_whole(file, "nouveau: é")
    assert file.read_text(encoding="utf-8") == "nouveau: é"


def test_a_folder_that_is_gone_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for place in (tmp_path / "file" / "below.txt", tmp_path / "nowhere" / "below.txt"):
        with pytest.raises(RunFolderError, match=r"^cannot write .*below\.txt: [^\n]*$"):
            write_whole(place, "text")


# ---------------------------------------------------------------------------------------------------- checkpoints

WEIGHTS = {
    "float": torch.tensor([0.1, -0.0, 1e-45, float("inf")]),
    "double": torch.tensor([[1 / 3]], dtype=torch.float64),
    "counter": torch.tensor(7),
    "bfloat": torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
    "strided": torch.arange(6.0).reshape(2, 3).T,
    "empty": torch.empty(0, 3),
}
RECORD = {"clock": 0.1 + 0.2, "tiny": 5e-324, "devices": {"device-é": [1, 2.5, None, True]}, "seed": 2**62 + 1}


def test_a_checkpoint_comes_back_to_the_bit(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "deep" / "checkpoints", 3, WEIGHTS, RECORD)
    kept = load_checkpoint(tmp_path / "deep" / "checkpoints")
    assert kept is not None
    assert kept.server_round == 3
    assert kept.record == RECORD
    assert same_bits(kept.weights, WEIGHTS)
    assert torch.signbit(kept.weights["float"][1])
    assert all(kept.weights[name].dtype == WEIGHTS[name].dtype for name in WEIGHTS)


def test_the_newest_two_checkpoints_are_kept_in_the_order_of_rounds(tmp_path: Path) -> None:
    for server_round in (8, 9, 10, 11):  # by name, 10 would come before 9
        save_checkpoint(tmp_path, server_round, WEIGHTS, {"round": server_round})
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "round-000010.safetensors",
        "round-000011.safetensors",
    ]
    kept = load_checkpoint(tmp_path)
    assert kept is not None
    assert kept.record == {"round": 11}


def cut(data: bytes) -> bytes:
    return data[:-1]


def no_record(data: bytes) -> bytes:
    return data.replace(b'"record"', b'"recoil"')


def no_json(data: bytes) -> bytes:
    return data.replace(rb"{\"round\"", rb"[\"round\"")


def pickled(data: bytes) -> bytes:
    """What would make a folder if anything unpickled it."""
    return b"cos\nmkdir\n(S'unpickled'\ntR."


@pytest.mark.parametrize("damage", [cut, no_record, no_json, pickled, lambda data: b""])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "checkpoints"
    files = [save_checkpoint(folder, server_round, WEIGHTS, {"round": server_round}) for server_round in (1, 2)]
    assert damage(files[1].read_bytes()) != files[1].read_bytes()
    files[1].write_bytes(damage(files[1].read_bytes()))
    kept = load_checkpoint(folder)
    assert kept is not None
    assert (kept.server_round, kept.record) == (1, {"round": 1})

    files[0].write_bytes(damage(files[0].read_bytes()))
    with pytest.raises(RunFolderError, match=r"^no checkpoint in .* can be read; the newest is round-000002"):
        load_checkpoint(folder)
    assert not (tmp_path / "unpickled").exists()


def test_a_folder_without_checkpoints_holds_none(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "none") is None


def test_a_checkpoint_that_cannot_be_written_keeps_those_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for server_round in (1, 2):
        save_checkpoint(tmp_path, server_round, WEIGHTS, {})
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(RunFolderError, match="No space left"):
        save_checkpoint(tmp_path, 3, WEIGHTS, {})
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"round-{one:06d}.safetensors" for one in (1, 2)]


# ----------------------------------------------------------------------------------------------------- run folder


def test_a_run_folder_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    folder = RunFolder.create(tmp_path / "empty", "seed: 1\n")  # an empty folder is as good as none
    assert saved_config(folder.path).read_text() == "seed: 1\n"
    with pytest.raises(RunFolderError, match=r"is there already; choose another name, or resume it with resume="):
        RunFolder.create(folder.path, "seed: 2\n")
    assert saved_config(folder.path).read_text() == "seed: 1\n"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunFolderError, match="is there already"):
        RunFolder.create(tmp_path / "file", "seed: 2\n")


@pytest.mark.parametrize("name", ["file/run", "x" * 300])
def test_a_run_folder_that_cannot_be_made_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RunFolderError, match=r"^cannot make the run folder [^\n]*$"):
        RunFolder.create(tmp_path / name, "seed: 1\n")
    with pytest.raises(RunFolderError, match=r"is not a run folder: it holds no config\.yaml$"):
        saved_config(tmp_path / name)


def test_a_run_folder_without_its_configuration_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(RunFolderError, match="No space left"):
        RunFolder.create(tmp_path / "run", "seed: 1\n")
    assert list(tmp_path.iterdir()) == []


def test_reopening_forgets_what_lies_beyond_the_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "seed: 1\n")
    for server_round in (1, 2, 3):
        folder.add_round({"server_round": server_round, "from": "first"})
    file = folder.path / "rounds.jsonl"
    with file.open("a") as stream:
        stream.write("{damaged, and beyond the checkpoint\n")
    reopened = RunFolder.reopen(folder.path, 2, "seed: 3\n")
    reopened.add_round({"server_round": 3, "from": "second"})
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["server_round"], line["from"]) for line in lines] == [(1, "first"), (2, "first"), (3, "second")]
    assert RunFolder.reopen(folder.path, 0, "seed: 3\n").rounds == []


def test_reopening_refuses_rounds_that_are_missing_or_damaged(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "seed: 1\n")
    with pytest.raises(RunFolderError, match=r"^cannot read .*rounds\.jsonl"):
        RunFolder.reopen(folder.path, 1, "seed: 3\n")
    folder.add_round({"server_round": 1})
    with pytest.raises(RunFolderError, match="holds 1 rounds; the checkpoint is of round 2"):
        RunFolder.reopen(folder.path, 2, "seed: 3\n")
    (folder.path / "rounds.jsonl").write_text("{damaged\n")
    with pytest.raises(RunFolderError, match=r"^cannot read .*rounds\.jsonl"):
        RunFolder.reopen(folder.path, 1, "seed: 3\n")


def test_a_checkpoint_never_knows_a_round_that_the_records_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder.create(tmp_path / "run", "seed: 1\n")
    recorder = Recorder(folder, lambda: (WEIGHTS, {"some": "state"}))
    recorder(report(1))
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(RunFolderError, match=r"rounds\.jsonl: No space left"):
        recorder(report(2))
    kept = load_checkpoint(folder.checkpoints)
    assert kept is not None
    assert kept.server_round == 1
    monkeypatch.undo()
    assert RunFolder.reopen(folder.path, 1, "seed: 3\n").rounds == [report(1).to_record()]
    assert (folder.path / "config.yaml").read_text() == "seed: 3\n"  # a resumed run may have more rounds


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"has \d+\.\d MB left; a run of this model needs 1000000000000\.0 MB"):
        RunFolder.create(tmp_path / "run", "seed: 1\n", needs_bytes=10**18)
    assert list(tmp_path.iterdir()) == []


def test_result_and_versions_are_plain_json(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "seed: 1\n")
    folder.write_result({"summary": summarise([report()]), "versions": versions(["torch", "no-such-package"])})
    result = json.loads((folder.path / "result.json").read_text())
    assert result["versions"]["no-such-package"] == "not installed"
    assert result["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert result["summary"]["up_bytes"] == 3_000_000
