"""Text of the split model, token for token that of the whole one: every mode, alone and with others in the cloud."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fl_edge.hat.adapter import Adapter, new_adapter
from fl_edge.hat.cloud import Cloud, Refusal
from fl_edge.hat.config import HatConfig
from fl_edge.hat.messages import Upload
from fl_edge.hat.middle import Middle
from fl_edge.hat.scheduling import Limits
from fl_edge.hat.session import DeviceSession
from fl_edge.hat.split import DeviceModel, load_device, load_middle
from fl_edge.seeding import torch_rng
from tests.tiny_hat import CPU, ONE_OF_EACH, draw_tokens, load_whole, save_model

NEW = 24
BASE = HatConfig(new_tokens=NEW, shortest_chunk=4, longest_chunk=8)
MODES: Mapping[str, HatConfig] = {
    "U-shape": replace(BASE, max_drafts=0, guesses=0, chunking="none"),
    "chunks": replace(BASE, max_drafts=0, guesses=0),
    "drafts": replace(BASE, guesses=0, chunking="none"),
    "every draft, however unsure": replace(BASE, threshold=0.0, guesses=0),
    "one draft": replace(BASE, threshold=1.0, guesses=0),
    "parallel drafts": replace(BASE, threshold=0.0, guesses=3),
}


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

    def session(self, config: HatConfig, heard: list[int], seed: int = 0) -> DeviceSession:
        return DeviceSession(self.device, self.adapter, config, 128, seed, (), lambda _, new: heard.extend(new))


@pytest.fixture(scope="module", params=ONE_OF_EACH)
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("model"), request.param)


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


@pytest.mark.parametrize("mode", MODES)
def test_alone(site: Site, mode: str) -> None:
    prompt, heard = draw_tokens(1, 19)[0], list[int]()
    serve(site.cloud(), [site.session(MODES[mode], heard)], [prompt])
    assert heard == site.expected(prompt)


@pytest.mark.parametrize("limits", [Limits(), Limits(tokens=12), Limits(tokens=16, chunk=4)])
def test_all_modes_at_once(site: Site, limits: Limits) -> None:
    texts = [list[int]() for _ in MODES]
    prompts = [draw_tokens(1, 11 + 3 * place, seed=place)[0] for place in range(len(MODES))]
    sessions = [site.session(config, heard) for config, heard in zip(MODES.values(), texts, strict=True)]
    serve(site.cloud(limits), sessions, prompts)
    assert texts == [site.expected(prompt) for prompt in prompts]


def test_drafts_hold_and_save_rounds(site: Site) -> None:
    session = site.session(MODES["every draft, however unsure"], [])
    serve(site.cloud(), [session], [draw_tokens(1, 19)[0]])
    account = session.account
    assert account.accepted > 0
    assert account.tokens == NEW
    assert account.rounds < NEW
    assert account.accept_length == (NEW - 1) / (account.rounds - 1)


def test_sampled_text_is_the_same_in_every_mode(site: Site) -> None:
    prompt, texts = draw_tokens(1, 9)[0], []
    for config in MODES.values():
        heard = list[int]()
        serve(site.cloud(), [site.session(replace(config, temperature=0.9, top_p=0.9), heard, seed=3)], [prompt])
        texts.append(heard)
    assert all(text == texts[0] for text in texts)
    assert texts[0] != site.expected(prompt)
