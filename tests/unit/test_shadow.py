"""Who is drawn, what a template is, and how the shadow is driven and counted."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from fake_engine import MODEL, FakeEngine, install

from cacheblend_rag import BlendConfig, CacheBlend, ConfigError, metrics
from cacheblend_rag.calibration import Calibration
from cacheblend_rag.client import replies
from cacheblend_rag.front.shadowing import Shadowing
from cacheblend_rag.keys import KeySpace
from cacheblend_rag.known import News
from cacheblend_rag.plan import NoPlan, Plan, PromptPrefix
from cacheblend_rag.planner import Limits, Planned, Planner, Space
from cacheblend_rag.reason import Reason
from cacheblend_rag.report import BlendReport, make_report
from cacheblend_rag.shadow import Figures, Sampler, Shadowed, ShadowOptions
from cacheblend_rag.shadow import report as reports
from cacheblend_rag.shadow.report import ShadowReport
from cacheblend_rag.shadow.sampling import Names, ratio_name, template_name

KEYS = KeySpace("weights", (1, 2), "")
CHUNK = tuple(range(100, 260))
QUESTION = tuple(range(900, 920))
CALIBRATION = Calibration(
    fingerprint="f",
    version="0",
    ratio=0.3,
    selector="query",
    changed_allowed=0.2,
    changed=0.1,
    mean_ratio=0.3,
    questions=7,
)


# ---- the draw ------------------------------------------------------------------------------------


def test_the_same_seed_draws_the_same_requests() -> None:
    def drawn(seed: int, share: float = 0.3) -> list[bool]:
        sampler = Sampler(seed)
        return [sampler.draw(share) for _ in range(2000)]

    assert drawn(5) == drawn(5) != drawn(6)
    assert sum(drawn(5)) / 2000 == pytest.approx(0.3, abs=0.04)
    assert not any(drawn(5, 0.0)) and all(drawn(5, 1.0))


def made(calibration: Calibration | None = None, **options: Any) -> Planner:
    """A planner that knows one chunk."""
    config = BlendConfig(blend_if="always", **options)
    planner = Planner(32)
    space = Space(
        name="s",
        keys=KEYS,
        options=config.request_defaults(),
        calibration=calibration,
        default=True,
    )
    planner.learn(0, space)
    planner.learn(0, News([row(KEYS.key(CHUNK), CHUNK)]))
    planner.learn(0, Limits())
    return planner


def row(key: str, ids: tuple[int, ...]) -> Any:
    from array import array

    return [key, array("i", ids).tobytes(), 2]


def plan(planner: Planner, head: tuple[int, ...] = tuple(range(8)), **options: Any) -> Planned:
    return planner.plan((*head, *CHUNK, *QUESTION), options)


def test_without_a_shadow_nothing_is_drawn_and_auto_is_the_calibration() -> None:
    planned = plan(made(CALIBRATION, recompute_ratio="auto"))
    assert planned.drawn is None
    assert isinstance(planned.plan, Plan) and planned.plan.ratio == 0.3


def test_blended_requests_are_drawn_with_their_template() -> None:
    planner = made(shadow=1.0)
    one, two = plan(planner).drawn, plan(planner, head=(7,) * 9).drawn
    assert one is not None and two is not None and one.template != two.template
    assert one == plan(planner).drawn
    named = plan(planner, template="answers-v2").drawn
    assert named is not None and named.template == "answers-v2"


def test_prompts_with_the_usual_beginning_are_of_one_template() -> None:
    usual = tuple(range(50, 60))
    config = BlendConfig(blend_if="always", shadow=1.0)
    planner = Planner(32)
    prefix = PromptPrefix("p", usual)
    options = config.request_defaults()
    planner.learn(
        0, Space(name="s", keys=KEYS, prompt_prefix=prefix, options=options, default=True)
    )
    planner.learn(0, News([row(KEYS.key(CHUNK), CHUNK)]))
    planner.learn(0, Limits())
    found = [
        plan(planner, head=head).drawn for head in (usual, (*usual, 7, 8), (*usual, 9), usual[:9])
    ]
    names = [drawn and drawn.template for drawn in found]
    assert names[0] == names[1] == names[2] != names[3]  # a question may stand there


def test_what_is_not_blended_is_not_drawn() -> None:
    planner = made(shadow=1.0)
    assert plan(planner, mode="off").drawn is None
    assert planner.plan(QUESTION, {}).drawn is None
    planner.learn(0, Limits(proving=True))
    assert plan(planner).drawn is None  # it is a proof, and exact


def test_templates_of_tenants_differ_and_their_names_are_not_shown() -> None:
    head = (1, 2, 3)
    assert template_name("a", head) != template_name("b", head)
    config = BlendConfig(blend_if="always", shadow=1.0, namespace="acme")
    planner = Planner(32)
    keys = KEYS._replace(namespace="acme")
    options = config.request_defaults()
    planner.learn(0, Space(name="t", keys=keys, options=options, default=True))
    planner.learn(0, News([row(keys.key(CHUNK), CHUNK)]))
    planner.learn(0, Limits())
    drawn = plan(planner).drawn
    assert drawn is not None and len(drawn.namespace) == 16 and "acme" not in repr(drawn)


# ---- the controller in the planner ---------------------------------------------------------------


def test_auto_is_moved_by_what_the_shadow_finds_until_blending_is_off() -> None:
    planner = made(CALIBRATION, recompute_ratio="auto", shadow=1.0, changed_allowed=0.05)
    ratios = []
    while True:
        planned = plan(planner)
        if isinstance(planned.plan, NoPlan):
            break
        assert planned.drawn is not None
        ratios.append(planned.plan.ratio)
        planner.learn(0, Shadowed(planned.drawn.key, planned.plan.ratio, True))
    assert ratios == [0.3, 0.5]  # from the calibration's on
    assert planned.plan.reason is Reason.CHANGED_TOO_OFTEN and planned.mode == "blend"
    assert "5%" in planned.plan.detail and "0.5" in planned.plan.detail
    other = plan(planner, head=(7,) * 9).plan  # of another template
    assert isinstance(other, Plan) and other.ratio == 0.3


def test_a_request_with_a_ratio_of_its_own_keeps_it() -> None:
    planner = made(recompute_ratio="auto", shadow=1.0)
    planned = plan(planner, recompute_ratio=0.4)
    assert isinstance(planned.plan, Plan) and planned.plan.ratio == 0.4
    assert planned.drawn is not None  # it is measured all the same
    assert isinstance(plan(planner).plan, Plan)  # the controller knows the template from here on
    for _ in range(9):  # and steers nobody else, at the ratio in force neither
        own = plan(planner, recompute_ratio=0.5).drawn
        assert own is not None
        planner.learn(0, Shadowed(own.key, 0.5, True))
    others = plan(planner)
    assert isinstance(others.plan, Plan) and others.plan.ratio == 0.5
    assert others.drawn is not None and others.drawn.key == f"s/{others.drawn.template}"


def test_a_space_travels_with_its_calibration() -> None:
    space = Space(name="s", keys=KEYS, calibration=CALIBRATION)
    assert Space.from_plain(space.to_plain()).calibration == CALIBRATION


# ---- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"shadow": 1.5}, "shadow is 1.5, but it is a share"),
        ({"shadow": "all"}, "shadow is 'all'; it must be a number"),
        ({"changed_allowed": -0.1}, "changed_allowed"),
        ({"template": "a b"}, "letters, digits"),
        ({"template": 7}, "template is 7"),
        ({"shadow_options": {"seeds": 1}}, "Did you mean 'seed'"),
        ({"shadow_options": {"seed": -1}}, "seed is -1"),
        ({"shadow_options": {"most_waiting": 0}}, "most_waiting is 0"),
        ({"shadow_options": {"most_tokens": True}}, "most_tokens is True"),
        ({"shadow_options": {"most_share": 2}}, "most_share is 2"),
        ({"shadow_options": {"least_ratio": 0.6}}, "swap them"),
        ({"shadow_options": 3}, "must be a table"),
    ],
)
def test_refused_options_say_what_would_do(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        BlendConfig(**options)


def test_options_are_plain_data() -> None:
    options = ShadowOptions(seed=3, most_waiting=4)
    assert ShadowOptions.of(options.to_plain()) == options


@pytest.mark.parametrize("refusal", ["", "speculative decoding is on"])
def test_an_engine_that_can_not_have_it_says_so_at_start(
    refusal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answers = list[str](), FakeEngine.rpc

    def rpc(self: FakeEngine, method: str, *args: Any) -> list[Any]:
        if not method.startswith("cacheblend_shadow"):
            return answers(self, method, *args)
        asked.append(method)
        none = {"steps": 0, "step_s": 0.0, "seconds": 0.0, "waiting": 0, "tokens": 0}
        own = {**none, "done": None, "dropped": {}}
        return [refusal] if method == "cacheblend_shadow_refusal" else [own]

    monkeypatch.setattr(FakeEngine, "rpc", rpc)
    started = install(monkeypatch)
    config = BlendConfig(shadow=0.1, recompute_ratio="auto")
    if not refusal:
        with CacheBlend(MODEL, config=config) as blend:
            space = blend.engine.planner._spaces[blend._name]  # type: ignore[attr-defined]
            assert space.options["shadow"] == 0.1 and space.options["recompute_ratio"] == "auto"
        return
    with pytest.raises(ConfigError, match=r"shadow=0.1 can't be had: speculative decoding is on"):
        CacheBlend(MODEL, config=config)
    assert asked == ["cacheblend_shadow_refusal"] and started[0].closed


# ---- driving it ----------------------------------------------------------------------------------


class Engine:
    """Answers ``cacheblend_shadow``; computing takes its clock forward."""

    def __init__(self) -> None:
        self.now, self.steps, self.asked, self.waiting = 0.0, 0, 0, 0
        self.calls: list[tuple[int, int]] = []
        self.computed = 0

    def rpc(self, method: str, parts: int, steps: int) -> list[Any]:
        assert method == "cacheblend_shadow"
        self.calls.append((parts, steps))
        done, seconds = None, 0.0
        if steps == self.steps and self.waiting:
            self.computed += parts
            seconds = 0.001 * parts
            self.now += seconds
            if self.computed >= 20:
                done, self.computed, self.waiting = ["", "t", 0.15, [4, 0.01, 1.0, 0, 0]], 0, 0
        return [
            {
                "steps": self.steps,
                "step_s": 0.02,
                "seconds": seconds,
                "waiting": self.waiting,
                "tokens": 100 if self.waiting else 0,
                "done": done,
                "dropped": {},
            }
        ]


@pytest.fixture
def engine() -> Engine:
    return Engine()


def shadowing(engine: Engine) -> Shadowing:
    return Shadowing(engine.rpc, lambda: engine.asked, clock=lambda: engine.now)


def run(driver: Shadowing, engine: Engine, seconds: float) -> None:
    """As a server's thread does: it looks again at once only where something was computed."""
    ends = engine.now + seconds
    while engine.now < ends:
        if not driver.once():
            engine.now += 0.1


def test_answers_are_computed_once_nobody_asks(engine: Engine) -> None:
    driver = shadowing(engine)
    engine.asked, engine.steps, engine.waiting = 1, 9, 1
    run(driver, engine, 0.4)
    assert not engine.calls  # it is not even asked
    run(driver, engine, 2.0)
    assert not engine.waiting
    assert engine.calls[0] == (1, -1)  # what it has done is asked before anything is computed
    assert all(steps == 9 for _, steps in engine.calls[1:])
    assert max(parts for parts, _ in engine.calls) <= 10  # slices of 10 ms, of parts of 1 ms


def test_an_engine_that_makes_steps_computes_nothing(engine: Engine) -> None:
    driver = shadowing(engine)
    engine.asked = engine.waiting = 1
    for _ in range(100):
        engine.steps += 1
        assert not driver.once()
        engine.now += 0.1
    assert engine.computed == 0 and len(engine.calls) <= 20
    run(driver, engine, 2.0)
    assert not engine.waiting


def test_who_has_nothing_to_do_is_asked_now_and_then_only(engine: Engine) -> None:
    run(shadowing(engine), engine, 100.0)
    assert 3 <= len(engine.calls) <= 7


# ---- what is told of it --------------------------------------------------------------------------


def test_figures_of_tokens() -> None:
    rows = [(0.0, True, True), (0.3, False, True), (0.6, False, False)]
    assert Figures.of(rows) == Figures(3, pytest.approx(0.3), pytest.approx(1 / 3), True, False)
    assert Figures.of([(-1e-12, True, True)]) == Figures(1, 0.0, 1.0, False, False)
    assert Figures.of([(0.1, True, False)]).first_changed


def test_the_number_of_names_is_bounded() -> None:
    names = Names(most=2)
    assert names.of("a", "x") == ("a", "x") and names.of("b", "x") == ("b", "x")
    assert names.of("c", "x") == ("other", "other") and names.of("a", "x") == ("a", "x")
    found = {ratio_name(n / 1000) for n in range(1001)}
    assert found == {"0", "0.05", "0.1", "0.15", "0.2", "0.3", "0.5", "1"}


def test_prometheus_has_histograms_by_template_and_ratio() -> None:
    prometheus = pytest.importorskip("prometheus_client")
    of = {"namespace": "", "template": "of-this-test", "ratio": "0.15"}

    def value(name: str, **more: str) -> float:
        found = prometheus.REGISTRY.get_sample_value(f"cacheblend_shadow_{name}", {**of, **more})
        return float(found or 0)

    metrics.observe_shadows(["", "of-this-test", 0.15, [4, 0.02, 0.75, True, False]], {})
    metrics.observe_shadows(["", "of-this-test", 0.12, [4, 0.0, 1.0, False, False]], {"failed": 2})
    metrics.observe_shadows(None, {"failed": 1})
    assert value("kl_count") == 2 and value("kl_sum") == pytest.approx(0.02)
    assert value("kl_bucket", le="0.01") == 1 and value("kl_bucket", le="0.03") == 2
    assert value("agreement_bucket", le="0.75") == 1
    assert value("answers_total", changed="later") == value("answers_total", changed="no") == 1
    dropped = {"reason": "failed"}
    found = prometheus.REGISTRY.get_sample_value("cacheblend_shadow_dropped_total", dropped)
    assert found is not None and found >= 3


def test_the_dashboard_asks_for_metrics_and_names_that_are_there() -> None:
    pytest.importorskip("prometheus_client")
    board = json.loads((Path(__file__).parents[2] / "examples/grafana.json").read_text())
    queries = " ".join(t["expr"] for panel in board["panels"] for t in panel.get("targets", ()))
    instruments = metrics._shadow_instruments()
    assert instruments is not None
    exposed = {f"{metric._name}_total": set(metric._labelnames) for metric in instruments[2:]}
    asked = dict.fromkeys(re.findall(r"\bcacheblend_\w+", queries))
    assert asked and asked.keys() <= exposed.keys()
    used = re.findall(r"by \((\w+)\) \(increase\(cacheblend_shadow|\{(changed)!=", queries)
    assert {name for pair in used for name in pair if name} == {"template", "changed"}
    assert {"template", "changed"} <= exposed["cacheblend_shadow_answers_total"]


def test_reports_have_it_and_clients_read_it() -> None:
    plan = {
        "segments": [[0, 64, "k", 0, 1]],
        "question_start": 64,
        "ratio": 0.15,
        "selector": "query",
        "selector_options": {},
    }
    engine = {
        "plan": plan,
        "recomputed": [9],
        "missing": [],
        "bytes": 1,
        "shadow": reports.done("t", Figures(4, 0.02, 0.75, True, False)),
    }
    times = {"ttft_s": 1.0, "total_s": 2.0, "tokenize_s": 0.0}
    report = make_report(None, engine, mode="blend", tokens_total=80, **times)
    assert report.shadow == ShadowReport(
        state="done",
        template="t",
        tokens=4,
        kl=0.02,
        agreement=0.75,
        changed=True,
        first_changed=False,
    )
    assert replies.report(report.to_dict()) == dataclasses.replace(
        report, segments=list(report.segments)
    )
    plain = BlendReport(mode="off", blended=False, tokens_total=1)
    assert replies.report(plain.to_dict()).shadow is None
    newer = {**report.to_dict(), "shadow": {**engine["shadow"], "more": 1}}
    assert replies.report(newer).shadow == report.shadow
