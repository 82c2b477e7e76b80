"""HAT+: the whole model's text whatever grows and however rows travel, and choices that are the best there are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fl_edge.errors import ReplyError
from fl_edge.hat.bytes import SCALE_BYTES, pack_rows, unpack_rows
from fl_edge.hat.generation import Generation, Round, Rules, generate
from fl_edge.hat.growing import GrowingTrees
from fl_edge.hat.messages import Upload
from fl_edge.hat.monitor import DeviceMonitor
from fl_edge.hat.pace import FixedPace
from fl_edge.hat.payoff import Acceptance, Costs, Payoff, choose
from fl_edge.hat.sampling import Sampler
from fl_edge.hat.split import load_middle
from fl_edge.hat.wire import read_upload, write_upload
from fl_edge.seeding import derive_seed, torch_rng
from tests.stub_hat import Draft, StubAdapter, StubDevice, StubLink, text_after
from tests.tiny_hat import CPU, draw_tokens
from tests.tiny_hat_site import BASE, Site, serve

PROMPT = [3, 1, 4, 1, 5]
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
        assert session.to_record()["measured"]["payoff"] == record["measured"]["payoff"]
        cloud.submit("a", upload, 0.0)
        ((_, answer),) = cloud.step(0.0)
        upload = session.answer(answer)  # type: ignore[arg-type]
    assert heard == site.expected(prompt)


# the loop, with an adapter that is right and sure where a test says


class Clock:
    """Time passes with every call."""

    def __init__(self, tick: float) -> None:
        self.now, self.tick = 0.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


def grow(
    drafts: Sequence[Draft], new_tokens: int, width: int, payoff: Payoff, link: StubLink, tick: float = 0.1
) -> list[Round]:
    device, sampler = StubDevice(drafts), Sampler()
    proposer = GrowingTrees(device, StubAdapter(), sampler, payoff, width, Clock(tick))
    pace, rules = FixedPace(), Rules(new_tokens, 64)
    return list(generate(Generation(device, proposer, sampler, pace, rules, 7, torch.tensor(PROMPT)), link))


@given(
    drafts=st.lists(st.builds(Draft, right=st.booleans(), sure=st.booleans()), min_size=1, max_size=7),
    new_tokens=st.integers(1, 20),
    width=st.integers(1, 6),
    ready=st.lists(st.booleans(), min_size=1, max_size=5),
    rate=st.one_of(st.none(), st.floats(0.01, 20.0)),
)
@settings(max_examples=150, deadline=None)
def test_the_text_is_the_whole_models_whatever_grows(
    drafts: list[Draft], new_tokens: int, width: int, ready: list[bool], rate: float | None
) -> None:
    payoff, link = Payoff(DeviceMonitor()), StubLink(ready)
    if rate is not None:
        payoff.rounded(1, 1 / rate)
    rounds = grow(drafts, new_tokens, width, payoff, link)
    expected = text_after(PROMPT, new_tokens)
    assert [token for each in rounds for token in each.tokens] == expected
    link.holds(PROMPT + expected)
    assert link.ended == [7]


def test_a_sure_adapter_has_long_drafts_and_a_wrong_one_none() -> None:
    lengths = {}
    for name, drafts in {"right": [Draft()], "wrong": [Draft(right=False)]}.items():
        payoff, link = Payoff(DeviceMonitor(), fixed_s=9.0, round_s=1.0, round_tokens=1.0), StubLink([True])
        grow(drafts, 40, 1, payoff, link, tick=0.5)
        lengths[name] = [len(upload.rows) for upload in link.uploads[1:]]
    assert max(lengths["right"]) > 5
    assert set(lengths["wrong"][12:]) == {1}  # as soon as it has been found out


def test_the_second_likeliest_token_is_in_the_tree_where_the_likeliest_is_wrong() -> None:
    wrong = [Draft(right=False, sure=False)]  # the right one comes second
    link = StubLink([True])
    grow(wrong, 30, 4, Payoff(DeviceMonitor(), fixed_s=9.0, round_s=9.0, round_tokens=1.0), link)
    assert any(upload.parents for upload in link.uploads)
    assert any(upload.kept and upload.kept[1:] not in ((), (1,)) for upload in link.uploads)


def test_a_tree_may_be_whole_before_the_cloud_has_spoken() -> None:
    device, payoff = StubDevice([Draft()]), Payoff(DeviceMonitor())
    trees, prompt, most = GrowingTrees(device, StubAdapter(), Sampler(), payoff, 1, Clock(0.1)), torch.tensor(PROMPT), 4
    rows = trees.read(prompt)
    assert trees.look_ahead(most + 1, lambda: False) == most + 2  # with the first token itself, which is drafted, too
    newest = text_after(PROMPT, 1)[0]
    assert trees.take_in(rows[-1:], [], newest)
    proposal = trees.propose(newest, len(PROMPT), most)
    assert list(proposal.tokens) == text_after(PROMPT, most + 1)
    assert payoff.leaves_s is None


# rows in bytes


@given(seed=st.integers(0, 999), rows=st.integers(1, 5), scale=st.sampled_from([0.0, 1e-30, 1.0, 1e30]))
@settings(max_examples=40, deadline=None)
def test_packed_rows_are_near_and_each_for_itself(seed: int, rows: int, scale: float) -> None:
    drawn = scale * torch.randn(rows, 16, generator=torch_rng(seed, "rows"))
    packed = pack_rows(drawn)
    assert packed.shape == (rows, 16 + SCALE_BYTES)
    assert packed.nbytes == packed.numel()
    back = unpack_rows(packed)
    assert bool(((back - drawn).abs() <= drawn.abs().amax(1, keepdim=True) / 253).all())
    assert torch.equal(torch.cat([pack_rows(row[None]) for row in drawn]), packed)
    assert unpack_rows(drawn) is drawn


def test_packed_rows_travel_and_other_bytes_do_not() -> None:
    rows = pack_rows(torch.randn(3, 8, generator=torch_rng(0, "rows")))
    plain, tensors = write_upload(Upload(1, 0, rows))
    assert torch.equal(read_upload(plain, tensors).rows, rows)
    with pytest.raises(ReplyError, match=r"packed rows of shape \(3, 4\)"):
        unpack_rows(rows[:, :4])


def rounded_text(site: Site, prompt: Tensor, count: int, sampler: Sampler) -> list[int]:
    """What the model that rounds its hidden states at both cuts says, without caches."""
    middle, text = load_middle(site.folder, 2, CPU), prompt.tolist()

    def rounded(states: Tensor) -> Tensor:
        return unpack_rows(pack_rows(states[0])).to(states)[None]

    for _ in range(count):
        states = rounded(site.device.embed_and_run(torch.tensor([text])))
        text += sampler.choose(site.device.head(rounded(middle(states))[0, -1:]), [len(text)])
    return text[len(prompt) :]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_in_bytes_every_mode_has_the_text_of_the_model_that_rounds(site: Site, temperature: float) -> None:
    base = replace(BASE, int8=True, temperature=temperature, new_tokens=16)
    modes = [replace(base, guesses=0), replace(base, threshold=0.0, guesses=3), replace(base, adaptive=True)]
    prompts = [draw_tokens(1, 9 + 4 * place, seed=place)[0] for place in range(len(modes))]
    texts = [list[int]() for _ in prompts]
    sessions = [site.session(config, text, 3) for config, text in zip(modes, texts, strict=True)]
    serve(site.cloud(), sessions, prompts)
    sampler = Sampler(temperature, 1.0, derive_seed(3, "hat", 5))
    assert texts == [rounded_text(site, prompt, base.new_tokens, sampler) for prompt in prompts]
    for session, prompt in zip(sessions, prompts, strict=True):
        rows = len(prompt) + session.account.drafted + session.account.rounds - 1
        assert session.account.up_bytes == rows * (32 + SCALE_BYTES)


@pytest.mark.parametrize("width", [32, 33 + SCALE_BYTES])
def test_the_cloud_refuses_packed_rows_of_another_width_and_without_a_scale(site: Site, width: int) -> None:
    cloud, packed = site.cloud(), torch.zeros(2, width, dtype=torch.int8)
    with pytest.raises(ReplyError, match=r"floats of shape \(n, 32\)"):
        cloud.submit("a", Upload(0, 0, packed, verify=False), 0.0)
    packed = torch.full((2, 32 + SCALE_BYTES), -1, dtype=torch.int8)  # a scale of NaN
    with pytest.raises(ReplyError, match="not all finite"):
        cloud.submit("a", Upload(0, 0, packed, verify=False), 0.0)


# what pays


@given(
    chances=st.lists(st.floats(0.01, 0.99), min_size=1, max_size=6),
    step=st.floats(0.1, 3.0),
    row=st.floats(0.0, 0.5),
    fixed=st.floats(0.5, 9.0),
)
@settings(max_examples=80, deadline=None)
def test_at_the_best_rate_a_chain_has_the_best_length(
    chances: list[float], step: float, row: float, fixed: float
) -> None:
    """The length that is chosen token by token at the rate of the best length is a best length."""
    chances = sorted(chances, reverse=True)  # chances fall along a chain faster still
    held = [1.0]
    for chance in chances:
        held.append(held[-1] * chance)
    rates = [sum(held[: more + 1]) / (fixed + more * step + (more + 1) * row) for more in range(len(held))]
    best = max(rates)
    length = 0
    while length < len(chances) and held[length + 1] > best * (step + row):
        length += 1
    assert rates[length] == pytest.approx(best)


def test_choices_on_plain_numbers() -> None:
    free = Costs(step_s=0.0, leaves_s=0.0, row_s=0.0, rate=1.0, further=0.5)
    assert choose(free, [0.5, 0.1], begun=True) == "step"
    dear = Costs(step_s=2.0, leaves_s=0.1, row_s=0.0, rate=1.0, further=0.5)
    assert choose(dear, [0.5, 0.1], begun=True) == "leaves"
    assert choose(dear, [0.05], begun=True) == "stop"
    assert choose(dear, [1.0], begun=False) == "leaves"  # the newest token itself must be run
    assert choose(dear, [], begun=True) == "stop"
    assert choose(Costs(0.1, 0.05, 9.0, 1.0, 0.9), [0.9], begun=True) == "stop"  # no row is worth its way


@given(
    leaves=st.lists(st.floats(0.001, 1.0), max_size=6),
    costs=st.builds(
        Costs, st.floats(0.0, 2.0), st.floats(0.0, 2.0), st.floats(0.0, 0.3), st.floats(0.1, 5.0), st.floats(0.0, 1.0)
    ),
    more=st.floats(1.0, 10.0),
)
@settings(max_examples=150, deadline=None)
def test_the_dearer_time_is_the_less_is_drafted(leaves: list[float], costs: Costs, more: float) -> None:
    ordered, rank = sorted(leaves, reverse=True), {"stop": 0, "leaves": 1, "step": 2}
    before = choose(costs, ordered, begun=True)
    assert rank[choose(replace(costs, step_s=more * costs.step_s), ordered, begun=True)] <= rank[before]
    worth = sum(map(costs.pays, ordered))
    assert sum(map(replace(costs, row_s=more * costs.row_s).pays, ordered)) <= worth


def test_shares_of_accepted_drafts_take_the_place_of_the_adapters_word() -> None:
    acceptance = Acceptance()
    assert acceptance.chance(0, 0.3) == 0.3
    for _ in range(400):
        acceptance.observe(0, 0.3, True)
    assert acceptance.chance(0, 0.3) > 0.95
    assert acceptance.chance(0, 0.9) == 0.9
    assert acceptance.chance(1, 0.3) == 0.3


def test_what_is_measured_makes_costs_and_survives_a_process() -> None:
    payoff = Payoff(DeviceMonitor(up=1000.0), row_bytes=10.0)
    payoff.stepped(0.3)
    payoff.leaved(0.2)
    payoff.drafted(0.5, 0.25)
    payoff.answered(4, 1.08)
    payoff.rounded(2, 4.0)
    assert payoff.costs == Costs(0.3, 0.2, 0.02, 0.5, 0.5)  # the way back counts as the way there
    assert payoff.answer_s(4) == pytest.approx(1.08)
    payoff.acceptance.observe(0, 0.5, True)
    back = Payoff.from_record(json.loads(json.dumps(payoff.to_record())), payoff.monitor)
    back.row_bytes = 10.0
    assert back == payoff


def test_steps_ahead_fill_the_wait_and_are_late_only_for_a_likely_gain() -> None:
    payoff = Payoff(DeviceMonitor(), step_s=1.0, fixed_s=2.5)
    assert payoff.goes_ahead([0.2], 3, waited_s=1.0)
    assert not payoff.goes_ahead([0.2], 3, waited_s=2.0)  # half a second late
    assert payoff.goes_ahead([0.4, 0.3], 3, waited_s=2.0)
    assert not payoff.goes_ahead([0.01], 3, waited_s=0.0)


def test_what_a_row_costs_is_learned_from_answers_where_the_link_was_never_measured() -> None:
    payoff = Payoff(DeviceMonitor())
    payoff.answered(3, 1.3)
    assert payoff.row_s == 0.0
    for rows in (1, 6, 2, 4) * 20:
        payoff.answered(rows, 1.0 + 0.1 * rows)
    assert payoff.row_s == pytest.approx(0.1)
    assert payoff.answer_s(5) == pytest.approx(1.5, abs=0.05)
    payoff.monitor.up, payoff.row_bytes = 1000.0, 10.0
    assert payoff.row_s == pytest.approx(0.02)
