"""The life of the engine child in virtual time."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.messages.session import PeerState
from services.inference import machine as m


def serving(at_ms: int = 0) -> m.EngineLife:
    life = m.EngineLife(load_deadline_ms=60_000)
    assert life.handle(m.Started(at_ms)) == [m.Launch(1)]
    assert life.handle(m.Launched(at_ms, 1)) == [m.Report(PeerState.LOADING, None)]
    assert life.handle(m.HealthOk(at_ms, 1)) == [m.Report(PeerState.READY, None)]
    return life


def test_an_engine_that_dies_is_degraded_and_launched_again_after_a_pause() -> None:
    life = serving()
    (report,) = life.handle(m.ChildExited(1_000, 1, "SIGKILL"))
    assert isinstance(report, m.Report)
    assert report.state is PeerState.DEGRADED
    assert report.reason == "the engine died: SIGKILL; next try in 0.5 s"
    assert life.handle(m.Ticked(1_499)) == []
    assert life.handle(m.Ticked(1_500)) == [m.Launch(2)]


def test_the_pauses_grow_while_launches_fail_and_begin_anew_after_a_stable_child() -> None:
    life = m.EngineLife(load_deadline_ms=1_000)
    now = 0
    life.handle(m.Started(now))
    pauses = []
    for launch in range(1, 9):
        life.handle(m.LaunchFailed(now, launch, "no file"))
        began = now
        while not life.handle(m.Ticked(now)):
            now += 100
        pauses.append(now - began)
    assert pauses == [500, 1_000, 2_000, 5_000, 10_000, 30_000, 30_000, 30_000]
    life.handle(m.Launched(now, 9))
    life.handle(m.HealthOk(now, 9))
    (report,) = life.handle(m.ChildExited(now + m.STABLE_MS, 9, "SIGKILL"))
    assert isinstance(report, m.Report)
    assert str(report.reason).endswith("next try in 0.5 s")


def test_a_crash_loop_does_not_begin_its_pauses_anew() -> None:
    life = serving()
    life.handle(m.ChildExited(1_000, 1, "SIGSEGV"))
    life.handle(m.Ticked(1_500))
    life.handle(m.Launched(1_500, 2))
    life.handle(m.HealthOk(1_600, 2))
    (report,) = life.handle(m.ChildExited(2_000, 2, "SIGSEGV"))
    assert isinstance(report, m.Report)
    assert str(report.reason).endswith("next try in 1 s")


def test_a_hung_engine_is_killed_but_a_working_one_is_not() -> None:
    life = serving()
    assert life.handle(m.HealthFailed(m.HUNG_MS, 1)) == []
    life.handle(m.Progressed(m.HUNG_MS, 1))
    assert life.handle(m.HealthFailed(2 * m.HUNG_MS, 1)) == []
    kill, report = life.handle(m.HealthFailed(2 * m.HUNG_MS + 1, 1))
    assert isinstance(kill, m.Kill)
    assert isinstance(report, m.Report)
    assert report.state is PeerState.DEGRADED
    assert life.handle(m.Ticked(10 * m.HUNG_MS)) == []  # never a second child beside one that will not die
    life.handle(m.ChildExited(10 * m.HUNG_MS, 1, "SIGKILL"))
    assert life.handle(m.Ticked(10 * m.HUNG_MS + 500)) == [m.Launch(2)]


def test_a_model_that_loads_beyond_its_deadline_is_killed_with_advice() -> None:
    life = m.EngineLife(load_deadline_ms=5_000)
    life.handle(m.Started(0))
    life.handle(m.Launched(0, 1))
    life.handle(m.HealthFailed(4_000, 1))
    assert life.handle(m.Ticked(5_000)) == []
    kill, _ = life.handle(m.Ticked(5_001))
    assert isinstance(kill, m.Kill)
    assert "load_deadline_s" in kill.reason


def test_a_slot_that_works_for_nobody_costs_the_child_its_life_only_if_it_lasts() -> None:
    life = serving()
    assert life.handle(m.SlotsSeen(1_000, 1, busy=2, calls=1)) == []
    assert life.handle(m.SlotsSeen(3_000, 1, busy=1, calls=1)) == []
    assert life.handle(m.SlotsSeen(4_000, 1, busy=2, calls=1)) == []
    assert life.handle(m.SlotsSeen(4_000 + m.STUCK_MS, 1, busy=2, calls=1)) == []
    assert isinstance(life.handle(m.SlotsSeen(4_001 + m.STUCK_MS, 1, busy=2, calls=1))[0], m.Kill)


def test_events_of_an_older_child_change_nothing() -> None:
    life = serving()
    life.handle(m.ChildExited(0, 1, "SIGKILL"))
    life.handle(m.Ticked(500))
    life.handle(m.Launched(500, 2))
    before = repr(life)
    old = [m.HealthOk(600, 1), m.HealthFailed(600, 1), m.SlotStuck(600, 1), m.ChildExited(600, 1, "again")]
    old += [m.HoldAsked(600, 1, "old"), m.HoldEnded(600, 1), m.ChangeAsked(600, 1, "old")]
    for event in [*old, m.Launched(600, 1), m.LaunchFailed(600, 1, "late"), m.Progressed(600, 1)]:
        assert life.handle(event) == []
    assert repr(life) == before


def test_a_change_of_mode_is_a_new_child_at_once_and_no_failure() -> None:
    life = serving()
    assert life.handle(m.HoldAsked(1_000, 1, "about to")) == [m.Report(PeerState.LOADING, "about to")]
    assert life.handle(m.HoldAsked(1_100, 1, "about to")) == []
    assert life.handle(m.ChangeAsked(2_000, 1, "changing")) == [
        m.Report(PeerState.LOADING, "changing"),
        m.Kill(1, "changing"),
    ]
    assert life.changing
    assert life.handle(m.ChildExited(2_100, 1, "SIGTERM")) == [m.Launch(2)]
    life.handle(m.Launched(2_100, 2))
    assert life.handle(m.HealthOk(2_200, 2)) == [m.Report(PeerState.READY, None)]
    assert (life.changing, life.failures) == (False, 0)


def test_a_hold_ends_without_a_change() -> None:
    life = serving()
    assert life.handle(m.HoldEnded(0, 1)) == []
    life.handle(m.HoldAsked(1_000, 1, "about to"))
    assert life.handle(m.HoldEnded(2_000, 1)) == [m.Report(PeerState.READY, None)]


def test_a_change_that_fails_waits_like_any_other_launch() -> None:
    life = serving()
    life.handle(m.ChangeAsked(0, 1, "changing"))
    life.handle(m.ChildExited(0, 1, "SIGTERM"))
    life.handle(m.Launched(0, 2))
    (report,) = life.handle(m.ChildExited(100, 2, "SIGSEGV"))
    assert isinstance(report, m.Report)
    assert report.state is PeerState.DEGRADED
    assert not life.changing, "calls do not wait for it"
    assert life.handle(m.Ticked(600)) == [m.Launch(3)]


def test_a_model_that_is_not_wanted_costs_no_child_until_it_is_asked_for() -> None:
    life = m.EngineLife(load_deadline_ms=60_000, wanted=False)
    assert life.handle(m.Started(0)) == [m.Report(PeerState.PARKED, None)]
    assert life.handle(m.Ticked(100_000)) == []
    assert life.handle(m.LoadAsked(100_000)) == [m.Launch(1), m.Report(PeerState.LOADING, None)]
    assert life.handle(m.LoadAsked(100_001)) == []
    life.handle(m.Launched(100_100, 1))
    assert life.handle(m.HealthOk(103_100, 1)) == [m.Report(PeerState.READY, None)]
    assert (life.loads, life.load_ms, life.respawns) == (1, 3_000, 0)
    assert life.handle(m.ParkAsked(200_000)) == [m.Unload(1), m.Report(PeerState.UNLOADING, None)]
    assert life.handle(m.ChildExited(200_500, 1, "SIGTERM")) == [m.Report(PeerState.PARKED, None)]
    assert life.handle(m.LoadAsked(200_600)) == [m.Launch(2), m.Report(PeerState.LOADING, None)]


def test_a_model_wanted_again_while_its_child_ends_is_launched_at_once_and_without_a_pause() -> None:
    life = serving()
    life.handle(m.ParkAsked(1_000))
    assert life.handle(m.LoadAsked(1_100)) == []
    assert life.handle(m.ChildExited(1_200, 1, "SIGTERM")) == [m.Launch(2), m.Report(PeerState.LOADING, None)]
    assert life.respawns == 0


def test_a_model_is_given_up_in_whatever_phase_it_is() -> None:
    launching = m.EngineLife(load_deadline_ms=60_000)
    launching.handle(m.Started(0))
    assert launching.handle(m.ParkAsked(10)) == [m.Report(PeerState.UNLOADING, None)]
    assert launching.handle(m.Launched(20, 1))[0] == m.Unload(1)
    assert launching.handle(m.ChildExited(30, 1, "SIGTERM")) == [m.Report(PeerState.PARKED, None)]
    failing = serving()
    failing.handle(m.ChildExited(1_000, 1, "SIGSEGV"))
    assert failing.handle(m.ParkAsked(1_100)) == [m.Report(PeerState.PARKED, None)]
    assert failing.handle(m.Ticked(60_000)) == []
    ending = serving()
    ending.handle(m.SlotStuck(1_000, 1))
    assert ending.handle(m.ParkAsked(1_100)) == []
    assert ending.handle(m.ChildExited(1_200, 1, "SIGKILL")) == [m.Report(PeerState.PARKED, None)]


def test_a_model_that_is_given_up_during_a_change_of_mode_is_parked() -> None:
    ending, launching = serving(), serving()
    for life in (ending, launching):
        life.handle(m.ChangeAsked(1_000, 1, "changing"))
    ending.handle(m.ParkAsked(1_050))
    assert ending.handle(m.ChildExited(1_100, 1, "SIGTERM")) == [m.Report(PeerState.PARKED, None)]
    assert launching.handle(m.ChildExited(1_100, 1, "SIGTERM")) == [m.Launch(2)]
    launching.handle(m.ParkAsked(1_150))
    assert launching.handle(m.Launched(1_200, 2))[0] == m.Unload(2)
    for life in (ending, launching):
        assert not life.changing, "calls do not wait for it"


class World:
    """Carries out commands in virtual time and counts children."""

    def __init__(self) -> None:
        self.life = m.EngineLife(load_deadline_ms=3_000)
        self.now_ms = 0
        self.asked: int | None = None
        self.alive: int | None = None
        self.state, self.reason = PeerState.LOADING, None
        self.feed(m.Started(0))

    def feed(self, event: m.Event) -> None:
        for command in self.life.handle(event):
            match command:
                case m.Launch(launch):
                    assert self.alive is None, "a second child"
                    assert self.asked is None, "a second launch while one is on its way"
                    self.asked = launch
                case m.Kill(launch) | m.Unload(launch):
                    assert launch == self.alive
                case m.Report(state, reason):
                    assert state is not PeerState.DEGRADED or reason
                    assert state is not PeerState.PARKED or (self.alive is None and self.asked is None)
                    self.state, self.reason = state, reason

    def do(self, action: str) -> None:
        launch = self.life.launch
        if action == "pass":
            self.now_ms += 700
            self.feed(m.Ticked(self.now_ms))
        elif action == "park":
            self.feed(m.ParkAsked(self.now_ms))
        elif action == "load":
            self.feed(m.LoadAsked(self.now_ms))
        elif action == "launch" and self.asked is not None:
            self.alive, self.asked = self.asked, None
            self.feed(m.Launched(self.now_ms, launch))
        elif action == "fail" and self.asked is not None:
            self.asked = None
            self.feed(m.LaunchFailed(self.now_ms, launch, "no file"))
        elif action == "exit" and self.alive is not None:
            self.alive = None
            self.feed(m.ChildExited(self.now_ms, launch, "SIGKILL"))
        elif action == "ok" and self.alive is not None:
            self.feed(m.HealthOk(self.now_ms, launch))
        elif action == "sick" and self.alive is not None:
            self.feed(m.HealthFailed(self.now_ms, launch))
        elif action == "stuck" and self.alive is not None:
            self.feed(m.SlotStuck(self.now_ms, launch))
        elif action == "hold" and self.alive is not None:
            self.feed(m.HoldAsked(self.now_ms, launch, "about to change"))
        elif action == "release" and self.alive is not None:
            self.feed(m.HoldEnded(self.now_ms, launch))
        elif action == "change" and self.alive is not None:
            self.feed(m.ChangeAsked(self.now_ms, launch, "changing"))
        elif action == "busy" and self.alive is not None:
            self.feed(m.SlotsSeen(self.now_ms, launch, busy=2, calls=0))


ACTIONS = ["pass", "launch", "fail", "exit", "ok", "sick", "stuck", "busy", "hold", "release", "change", "park", "load"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(ACTIONS), max_size=80))
def test_never_two_children_and_in_the_end_ready_or_degraded_with_a_reason(actions: list[str]) -> None:
    world = World()
    for action in actions:
        world.do(action)
    world.do("load")
    for _ in range(120):  # from here on launches fail
        if world.life.phase is m.Phase.ENDING:
            world.do("exit")
        world.do("fail")
        world.do("sick")
        world.do("pass")
    if world.alive is None:
        assert world.state is PeerState.DEGRADED
        assert world.reason
    for _ in range(120):  # and from here on everything works
        if world.life.phase is m.Phase.ENDING:
            world.do("exit")
        world.do("launch")
        world.do("ok")
        world.do("release")
        world.do("pass")
    assert world.state is PeerState.READY
    assert world.alive is not None
    world.do("park")
    for _ in range(3):
        world.do("exit")
        world.do("pass")
    assert world.state is PeerState.PARKED
    assert world.alive is None
