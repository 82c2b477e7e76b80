"""HAT+: the whole model's text whatever grows and however rows travel, and choices that are the best there are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fl_edge.hat.messages import Upload
from tests.tiny_hat import draw_tokens
from tests.tiny_hat_site import BASE, Site, serve

PLUS = replace(BASE, adaptive=True)


@pytest.fixture(scope="module", params=["llama", "mistral, windows", "qwen2, windows from layer 3", "qwen3"])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("model"), request.param)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_split_text_is_the_whole_models(site: Site, temperature: float) -> None:
    configs = [replace(PLUS, temperature=temperature, top_p=0.95, draft_width=width) for width in (1, 2, 4)]
    prompts = [draw_tokens(1, 9 + 4 * place, seed=place)[0] for place in range(3)]
    texts, expected = [list[int]() for _ in prompts], [list[int]() for _ in prompts]
    sessions = [site.session(config, text, 3) for config, text in zip(configs, texts, strict=True)]
    serve(site.cloud(), sessions, prompts)
    plain = replace(configs[0], adaptive=False, max_drafts=0, guesses=0)
    serve(site.cloud(), [site.session(plain, text, 3) for text in expected], prompts)
    assert texts == expected
    if not temperature:
        assert texts == [site.expected(prompt) for prompt in prompts]
    assert all(session.account.accepted for session in sessions)


def test_a_session_goes_on_in_a_fresh_process(site: Site) -> None:
    prompt, heard = draw_tokens(1, 9)[0], list[int]()
    cloud, config = site.cloud(), replace(PLUS, chunking="none")
    session = site.session(config, heard)
    upload: Upload | None = session.begin(5, prompt)
    while upload is not None:
        record = session.to_record()
        session = site.session(config, heard)
        session.restore(record, prompt)
        assert session.to_record()["payoff"] == record["payoff"]
        cloud.submit("a", upload, 0.0)
        ((_, answer),) = cloud.step(0.0)
        upload = session.answer(answer)  # type: ignore[arg-type]
    assert heard == site.expected(prompt)
