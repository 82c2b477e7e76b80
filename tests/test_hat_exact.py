"""Text of the split model, token for token that of the whole one: every mode, alone and with others in the cloud."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from fl_edge.hat.config import HatConfig
from fl_edge.hat.scheduling import Limits
from tests.tiny_hat import ONE_OF_EACH, draw_tokens
from tests.tiny_hat_site import BASE, NEW, Site, serve

MODES: Mapping[str, HatConfig] = {
    "U-shape": replace(BASE, max_drafts=0, guesses=0, chunking="none"),
    "chunks": replace(BASE, max_drafts=0, guesses=0),
    "drafts": replace(BASE, guesses=0, chunking="none"),
    "every draft, however unsure": replace(BASE, threshold=0.0, guesses=0),
    "one draft": replace(BASE, threshold=1.0, guesses=0),
    "parallel drafts": replace(BASE, threshold=0.0, guesses=3),
}


@pytest.fixture(scope="module", params=ONE_OF_EACH)
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("model"), request.param)


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
