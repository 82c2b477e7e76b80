"""A split model with its adapter, sessions and a cloud, all in one process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fl_edge.hat.adapter import Adapter, new_adapter
from fl_edge.hat.cloud import Cloud, Refusal
from fl_edge.hat.config import HatConfig
from fl_edge.hat.medusa import MedusaHeads
from fl_edge.hat.messages import Upload
from fl_edge.hat.middle import Middle
from fl_edge.hat.scheduling import Limits
from fl_edge.hat.session import DeviceSession
from fl_edge.hat.split import DeviceModel, load_device, load_middle
from fl_edge.seeding import torch_rng
from tests.tiny_hat import CPU, load_whole, save_model

NEW = 24
BASE = HatConfig(new_tokens=NEW, shortest_chunk=4, longest_chunk=8)


class Site:
    """A saved model, whole and in parts."""

    def __init__(self, folder: Path, name: str) -> None:
        self.whole: Any = load_whole(save_model(folder / "drawn", name))
        for layer in self.whole.model.layers[2:]:  # a middle that changes little, so that some drafts hold
            for parameter in (*layer.self_attn.o_proj.parameters(), *layer.mlp.down_proj.parameters()):
                parameter.mul_(0.02)
        self.whole.save_pretrained(folder)
        self.device: DeviceModel = load_device(folder, 2, CPU)
        self.folder = folder
        self.adapter: Adapter = new_adapter(self.device, torch_rng(0, "adapter")).to(torch.float64)
        with torch.no_grad():
            self.adapter.get_parameter("attention.o_proj.weight").mul_(0.01)

    def cloud(self, limits: Limits | None = None) -> Cloud:
        limits = limits or Limits()
        return Cloud(Middle(load_middle(self.folder, 2, CPU), 128, 128 * 8), limits, lease_s=60)

    def expected(self, prompt: Tensor, new_tokens: int = NEW) -> list[int]:
        found = self.whole.generate(
            prompt[None], max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        return found[0, len(prompt) :].tolist()  # type: ignore[no-any-return]

    def session(
        self, config: HatConfig, heard: list[int], seed: int = 0, heads: MedusaHeads | None = None
    ) -> DeviceSession:
        adapter = heads or self.adapter
        return DeviceSession(self.device, adapter, config, 128, seed, (), lambda _, new: heard.extend(new))


def serve(cloud: Cloud, sessions: Sequence[DeviceSession], prompts: Sequence[Tensor], ahead: bool = True) -> None:
    """All devices at once, each in its own time."""

    def submit(place: int, upload: Upload) -> None:
        cloud.submit(str(place), upload, 0.0)
        if not upload.last:
            submit(place, sessions[place].go_on())
        elif ahead:
            sessions[place].look_ahead()

    for place, prompt in enumerate(prompts):
        submit(place, sessions[place].begin(5, prompt))
    while cloud.requests:
        for name, answer in cloud.step(0.0):
            assert not isinstance(answer, Refusal)
            if not len(answer.rows):
                continue
            upload = sessions[int(name)].answer(answer)
            if upload is None:
                cloud.end(name, 5)
            else:
                submit(int(name), upload)
