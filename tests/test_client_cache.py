"""The cache of a client's weights: what comes back is what was kept, or an error."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
import torch

from fl_edge.clients.cache import WeightCache
from fl_edge.errors import ReplyError
from fl_edge.files import default_folder
from tests.tiny import same_bits

WEIGHTS = {
    "weight": torch.tensor([0.1, -0.0, 1e-45, float("inf")]),
    "strided": torch.arange(6.0).reshape(2, 3).T,
    "counter": torch.tensor(7),
    "half": torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
}
OTHER = {"weight": torch.zeros(4)}


def test_weights_come_back_to_the_bit(tmp_path: Path) -> None:
    digest = WeightCache(tmp_path).save(1, 2, WEIGHTS)
    kept = WeightCache(tmp_path).load(1, 2, digest)  # another process has another cache object
    assert same_bits(kept, WEIGHTS)
    assert torch.signbit(kept["weight"][1])
    assert kept["half"].dtype == torch.bfloat16


def test_nodes_and_runs_do_not_share_weights(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path)
    digests = {place: cache.save(*place, {"at": torch.tensor(place)}) for place in [(1, 1), (1, 2), (2, 1)]}
    for place, digest in digests.items():
        assert cache.load(*place, digest)["at"].tolist() == list(place)


def test_a_save_replaces_the_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path)
    old, new = cache.save(1, 2, WEIGHTS), cache.save(1, 2, OTHER)
    assert same_bits(cache.load(1, 2, new), OTHER)
    with pytest.raises(ReplyError, match="are not those it kept"):
        cache.load(1, 2, old)
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["2.safetensors"]


def test_a_save_that_fails_leaves_the_old_weights_and_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = WeightCache(tmp_path)
    digest = cache.save(1, 2, WEIGHTS)

    def half(path: Path, data: bytes) -> int:
        with path.open("wb") as stream:
            stream.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(ReplyError, match=r"^cannot keep weights in .*: No space left on device; set FL_EDGE_CACHE$"):
        cache.save(1, 2, OTHER)
    assert same_bits(cache.load(1, 2, digest), WEIGHTS)
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["2.safetensors"]


def test_damaged_or_missing_weights_are_refused(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path)
    digest = cache.save(1, 2, WEIGHTS)
    (file,) = tmp_path.rglob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # a single bit of a single weight
    file.write_bytes(data)
    with pytest.raises(ReplyError, match=r"node 2 in .* are not those it kept"):
        cache.load(1, 2, digest)
    file.unlink()
    with pytest.raises(ReplyError, match="node 2 are no longer in"):
        cache.load(1, 2, digest)


def test_drop_removes_the_node_and_runs_older_than_a_week(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path)
    digests = {run: cache.save(run, 5, WEIGHTS) for run in (1, 2, 3)}
    neighbour = cache.save(1, 6, OTHER)
    for _ in range(2):  # again when the node has nothing left: that leaves the folder's time as it is
        for run, days in ((1, 30), (2, 6), (3, 8)):
            if (folder := tmp_path / "weights" / str(run)).exists():
                then = time.time() - days * 86400
                os.utime(folder, (then, then))
        cache.drop(1, 5)
    with pytest.raises(ReplyError, match="no longer"):
        cache.load(1, 5, digests[1])
    assert same_bits(cache.load(1, 6, neighbour), OTHER)  # its own run goes on, however old its folder
    assert same_bits(cache.load(2, 5, digests[2]), WEIGHTS)
    assert sorted(folder.name for folder in (tmp_path / "weights").iterdir()) == ["1", "2"]


def test_dropping_what_was_never_kept_is_no_error(tmp_path: Path) -> None:
    WeightCache(tmp_path / "none").drop(1, 5)
    cache = WeightCache(tmp_path)
    digest = cache.save(1, 5, WEIGHTS)
    cache.drop(1, 6)
    cache.drop(9, 5)
    assert same_bits(cache.load(1, 5, digest), WEIGHTS)


def test_the_folder_is_chosen_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FL_EDGE_CACHE", str(tmp_path / "chosen"))
    WeightCache().save(1, 2, WEIGHTS)
    assert list((tmp_path / "chosen").rglob("2.safetensors"))
    monkeypatch.delenv("FL_EDGE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg" / "fl_edge"
    monkeypatch.setenv("XDG_CACHE_HOME", "")  # as good as not set; never a folder below the working directory
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "fl_edge"


def test_only_the_user_may_read_the_weights(tmp_path: Path) -> None:
    WeightCache(tmp_path).save(1, 2, WEIGHTS)
    assert (tmp_path / "weights" / "1").stat().st_mode & 0o077 == 0


def test_a_cache_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ReplyError, match=r"^cannot keep weights in .*: Not a directory; set FL_EDGE_CACHE$"):
        WeightCache(tmp_path / "file").save(1, 2, WEIGHTS)
