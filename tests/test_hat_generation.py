"""The device's loop: the text of the whole model under every pattern of drafts, answers, chunks and guesses."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_edge.errors import ConfigError, ReplyError
from fl_edge.hat.chains import Chains
from fl_edge.hat.generation import Generation, Round, Rules, generate
from fl_edge.hat.messages import Answer
from fl_edge.hat.pace import FixedPace
from fl_edge.hat.sampling import Sampler
from tests.stub_hat import Draft, StubAdapter, StubDevice, StubLink, text_after

PROMPT = [3, 1, 4, 1, 5]
ALL = {"right": Draft(), "wrong": Draft(right=False), "unsure": Draft(sure=False)}


def begin(
    device: StubDevice,
    adapter: bool,
    new_tokens: int,
    pace: FixedPace,
    prompt: Sequence[int],
    guesses: int = 0,
    **rules: object,
) -> Generation:
    asked = Rules(new_tokens, **{"context": 64, **rules})  # type: ignore[arg-type]
    proposer = Chains(device, StubAdapter() if adapter else None, Sampler(), pace, guesses)
    return Generation(device, proposer, Sampler(), pace, asked, 7, torch.tensor(prompt, dtype=torch.int64))


def run(
    drafts: Sequence[Draft] = (Draft(),),
    new_tokens: int = 20,
    pace: FixedPace | None = None,
    link: StubLink | None = None,
    adapter: bool = True,
    prompt: Sequence[int] = PROMPT,
    guesses: int = 0,
    **rules: object,
) -> tuple[list[Round], StubLink, StubDevice]:
    link, device = link or StubLink(), StubDevice(drafts)
    generation = begin(device, adapter, new_tokens, pace or FixedPace(), prompt, guesses, **rules)
    rounds = list(generate(generation, link))
    assert generation.over
    assert generation.text == text(rounds)
    return rounds, link, device


def text(rounds: Sequence[Round]) -> list[int]:
    return [token for each in rounds for token in each.tokens]


@given(
    drafts=st.lists(st.builds(Draft, right=st.booleans(), sure=st.booleans()), min_size=1, max_size=9),
    new_tokens=st.integers(1, 25),
    chunk=st.integers(0, 6),
    most=st.integers(0, 5),
    ahead=st.integers(0, 6),
    guesses=st.integers(0, 3),
    ready=st.lists(st.booleans(), min_size=1, max_size=5),
    prompt=st.lists(st.integers(0, 10), min_size=1, max_size=9),
)
@settings(max_examples=250, deadline=None)
def test_the_text_is_the_whole_models(
    drafts: list[Draft],
    new_tokens: int,
    chunk: int,
    most: int,
    ahead: int,
    guesses: int,
    ready: list[bool],
    prompt: list[int],
) -> None:
    pace = FixedPace(chunk, most, ahead)
    rounds, link, _ = run(drafts, new_tokens, pace, StubLink(ready), prompt=prompt, guesses=guesses)
    assert text(rounds) == text_after(prompt, new_tokens)
    assert all(len(each.tokens) == each.accepted + 1 and each.accepted <= each.drafted <= most for each in rounds)
    assert link.ended == [7]


def test_right_drafts_take_a_round_for_all_of_them_and_one_more() -> None:
    rounds, link, _ = run(new_tokens=15, pace=FixedPace(most_drafts=6))
    assert [len(each.tokens) for each in rounds] == [1, 7, 7]
    assert [len(upload.rows) for upload in link.uploads] == [5, 7, 7]
    assert [upload.base for upload in link.uploads] == [0, 5, 12]


def test_wrong_drafts_take_a_round_for_each_token() -> None:
    rounds, link, _ = run([ALL["wrong"]], 5, FixedPace(most_drafts=3))
    assert [(each.drafted, each.accepted) for each in rounds] == [(0, 0), (3, 0), (2, 0), (1, 0), (0, 0)]
    assert [upload.base for upload in link.uploads] == [0, 5, 6, 7, 8]


def test_an_unsure_token_is_the_last_of_a_draft_and_verified() -> None:
    rounds, _, _ = run([ALL["unsure"]], 7)
    assert [(each.drafted, each.accepted) for each in rounds] == [(0, 0), (1, 1), (1, 1), (1, 1)]


def test_without_an_adapter_every_token_is_a_round() -> None:
    rounds, link, device = run(new_tokens=6, adapter=False)
    assert [each.drafted for each in rounds] == [0] * 6
    assert [len(upload.rows) for upload in link.uploads] == [5, 1, 1, 1, 1, 1]
    assert device.steps == 6


def test_a_prompt_travels_in_chunks_and_only_its_end_is_answered() -> None:
    _, link, _ = run(new_tokens=1, pace=FixedPace(chunk_tokens=2))
    assert [(each.base, len(each.rows), each.last, each.verify) for each in link.uploads] == [
        (0, 2, False, False),
        (2, 2, False, False),
        (4, 1, True, False),
    ]


def test_a_guess_that_comes_true_saves_the_next_draft() -> None:
    slow, _, before = run(new_tokens=22)
    fast, link, after = run(new_tokens=22, guesses=2)
    assert text(fast) == text(slow)
    assert [each.ahead for each in fast] == [True, True, True, True, False]
    assert [len(upload.rows) for upload in link.uploads] == [5, 6, 6, 6, 3]  # as many as steps were made ahead
    assert after.steps <= before.steps + 2  # all steps but the last are made while the device waits


def test_the_second_guess_may_come_true() -> None:
    hit, _, _ = run([ALL["wrong"]], 4, FixedPace(most_drafts=0), guesses=2)
    missed, _, _ = run([ALL["wrong"]], 4, FixedPace(most_drafts=0), guesses=1)
    assert [each.ahead for each in hit] == [True, True, True, False]
    assert not any(each.ahead for each in missed)
    assert text(hit) == text(missed)


def test_nothing_is_guessed_once_the_answer_is_there() -> None:
    rounds, _, _ = run(link=StubLink([True]), guesses=2)
    assert not any(each.ahead for each in rounds)


@pytest.mark.parametrize("guesses", [0, 2])
def test_a_stop_ends_the_text_also_in_the_middle_of_a_draft(guesses: int) -> None:
    whole = text_after(PROMPT, 20)
    stop = whole[4]
    rounds, link, _ = run(stops=[stop], guesses=guesses)
    assert text(rounds) == whole[: whole.index(stop) + 1]
    assert link.ended == [7]


def test_the_context_bounds_the_text() -> None:
    rounds, link, _ = run(new_tokens=99, context=12)
    assert len(text(rounds)) == 12 - len(PROMPT)
    assert max(upload.base + len(upload.rows) for upload in link.uploads) < 12


@pytest.mark.parametrize(("prompt", "new_tokens"), [([], 5), ([1] * 64, 5), ([1], 0)])
def test_a_prompt_that_leaves_no_room_is_refused(prompt: list[int], new_tokens: int) -> None:
    with pytest.raises(ConfigError, match="allowed are 1 to 63 tokens"):
        run(prompt=prompt, new_tokens=new_tokens)


@pytest.mark.parametrize("rows", [torch.zeros(2, 2), torch.full((1, 2), torch.nan)])
def test_an_answer_that_does_not_fit_is_refused_and_the_request_ended(rows: torch.Tensor) -> None:
    class Wrong(StubLink):
        def receive(self) -> Answer:
            return Answer(7, rows)

    link = Wrong()
    with pytest.raises(ReplyError, match="1 finite ones were due"):
        run(link=link)
    assert link.ended == [7]


def test_who_stops_listening_ends_the_request() -> None:
    link = StubLink()
    rounds = generate(begin(StubDevice(), True, 9, FixedPace(), PROMPT), link)
    next(rounds)
    rounds.close()  # type: ignore[attr-defined]
    assert link.ended == [7]


@given(
    drafts=st.lists(st.builds(Draft, right=st.booleans(), sure=st.booleans()), min_size=1, max_size=9),
    chunk=st.integers(1, 4),
    guesses=st.integers(0, 2),
)
@settings(max_examples=60, deadline=None)
def test_a_generation_goes_on_in_a_fresh_process_at_every_message(
    drafts: list[Draft], chunk: int, guesses: int
) -> None:
    pace, link = FixedPace(chunk, 3, 3), StubLink()

    def fresh(before: Generation | None) -> Generation:
        after = begin(StubDevice(drafts), True, 15, pace, PROMPT, guesses=guesses)
        if before is not None:
            after.restore(before.text, before.sent, before.pending)
        return after

    generation = fresh(None)
    while generation.sent < len(PROMPT):
        generation = fresh(generation)
        link.send(generation.next_chunk())
    while not generation.over:
        generation = fresh(generation)
        generation.look_ahead(lambda: False)
        generation.take_in(link.receive().rows)
        if not generation.over:
            link.send(generation.propose())
    assert generation.text == text_after(PROMPT, 15)
