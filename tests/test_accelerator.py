"""Where a model computes: what is there, or one line."""

from __future__ import annotations

import pytest
import torch

from fl_edge.errors import ConfigError
from fl_edge.models.accelerator import find_accelerator


def test_the_cpu_is_always_there() -> None:
    assert find_accelerator("cpu") == "cpu"


@pytest.mark.parametrize("there", [True, False])
def test_auto_takes_what_is_there(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert find_accelerator("auto") == ("cuda" if there else "cpu")


@pytest.mark.parametrize("name", ["cuda:77", "gpu", ""])
def test_what_is_not_there_is_one_line(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^accelerator={name} cannot be used: ") as refused:
        find_accelerator(name)
    assert "\n" not in str(refused.value)
