"""Which tokens leave: invariant 1 under any interleaving, and the queue's own rules."""

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from plain_filter import NAN, Kernel, PlainStream, logit_in_bin, random_chain

from midstream.holdback import HoldBack
from midstream.kernels.tables import Verdict
from midstream.policy import Policy

C, H, X = Verdict.CONTINUE, Verdict.HOLD, Verdict.HALT
SLOTS = 4

CHAIN = random_chain(2)
THRESHOLDS = {
    "strict": {"horizon": 3, "halt_at": 0.7, "hold_at": 0.5, "release_at": 0.35},
    "loose": {"horizon": 3, "halt_at": 0.9},  # held by unscored tokens alone
}
POLICIES = {
    mode: Policy(tiers=THRESHOLDS, default_tier="strict", on_unscored=mode)
    for mode in ("pass", "hold", "halt")
}
ROWS = [(mode, tier) for mode in POLICIES for tier in THRESHOLDS]  # of the joined policy tables

LOGITS = [logit_in_bin(o) for o in range(4)] + [NAN]


class Stream:
    """A stream in the engine, and what an outsider may say about the tokens that left it."""

    def __init__(self, slot, row, depth, start):
        self.slot, self.depth = slot, depth
        self.mode, tier = ROWS[row]
        self.queue = HoldBack(depth, passes_unscored=self.mode == "pass")
        self.model = PlainStream(CHAIN, POLICIES[self.mode].tiers[tier], self.mode)
        self.next = start
        self.pushed = []  # a token is its position
        self.left = []
        self.judged = -1
        self.scored = set()
        self.halted = False

    def push(self):
        self.queue.push(self.next, self.next)
        self.pushed.append(self.next)
        self.next += 1

    def feed_model(self, logit):
        """The last token pushed was fed, those before it since the last one were not."""
        for _ in range(self.next - 1 - max(self.judged + 1, self.pushed[0])):
            self.model.token(NAN)
        self.model.token(logit)
        if not math.isnan(logit):
            self.scored.add(self.next - 1)

    def judge(self, verdict, *, scored=True):
        position = self.next - 1
        if self.model.near_a_threshold:
            self.model.verdict = verdict
        assert verdict == self.model.verdict
        assert not self.halted or verdict == X
        self.halted |= verdict == X
        leaving = self.queue.judge(position, verdict, scored=scored)
        self.judged = position
        if verdict != C or self.depth == "turn":
            expected = []
        else:  # own judgement, and those of depth - 1 tokens after it
            expected = [
                token
                for token in self.pushed
                if token not in self.left
                and sum(token < other <= position for other in self.pushed) >= self.depth - 1
            ]
        assert leaving == expected
        self.leave(leaving)

    def finish(self):
        leaving = self.queue.finish()
        if self.halted or self.model.verdict != C:
            assert leaving == []
        else:  # everything that was judged, whatever the depth
            last = self.next if self.mode == "pass" else self.judged
            assert leaving == [t for t in self.pushed if t <= last and t not in self.left]
        self.leave(leaving, at_end=True)
        assert self.queue.released == len(self.left)
        assert self.queue.released + self.queue.withheld == len(self.pushed)
        assert self.queue.released_unscored == len(set(self.left) - self.scored)

    def leave(self, tokens, *, at_end=False):
        """Invariant 1, without the rule that implements it."""
        for token in tokens:
            assert not self.halted, "left after a halt"
            assert self.model.verdict == C, "left while held"
            if self.mode == "halt":
                assert token in self.scored, "left unscored"
            elif self.mode == "hold":
                assert any(scored >= token for scored in self.scored), "left before any score"
            assert token <= self.judged or (self.mode == "pass" and at_end), "left unjudged"
            self.left.append(token)
        assert self.left == self.pushed[: len(self.left)], "overtook, or left twice"


class Engine(RuleBasedStateMachine):
    """Streams come and go; in each step some of them get a token, which is fed, or is not."""

    def __init__(self):
        super().__init__()
        tables = (policy.table(CHAIN) for policy in POLICIES.values())
        self.kernel = Kernel(CHAIN, *tables, slots=SLOTS)
        self.streams = {}

    @precondition(lambda self: len(self.streams) < SLOTS)
    @rule(
        row=st.integers(0, len(ROWS) - 1),
        depth=st.integers(1, 4) | st.just("turn"),
        prompt=st.lists(st.sampled_from(LOGITS[:-1]), max_size=3),
    )
    def admit(self, row, depth, prompt):
        slot = min(set(range(SLOTS)) - set(self.streams))
        self.kernel.admit(slot, start=len(prompt), row=row)
        stream = self.streams[slot] = Stream(slot, row, depth, len(prompt))
        if prompt:
            self.kernel.feed(*((slot, position, logit) for position, logit in enumerate(prompt)))
            stream.model.prompt(prompt[-1])
            stream.halted = stream.model.verdict == X
            assert stream.queue.judge(len(prompt) - 1, self.kernel.verdict(slot)) == []

    @precondition(lambda self: self.streams)
    @rule(data=st.data())
    def step(self, data):
        rows = []
        for stream in data.draw(st.permutations(sorted(self.streams.values(), key=id_of))):
            what = data.draw(st.sampled_from(["token", "token", "token", "gap", "nothing"]))
            if what == "nothing":
                continue
            stream.push()
            if what == "token":
                rows.append((stream.slot, stream.next - 1, data.draw(st.sampled_from(LOGITS))))
        padding = [(-1, 0, 0.0)] * data.draw(st.integers(0, 1))
        if rows:
            self.kernel.feed(*padding, *rows)
        for slot, _, logit in rows:
            self.streams[slot].feed_model(logit)
            self.streams[slot].judge(self.kernel.verdict(slot), scored=not math.isnan(logit))

    @precondition(lambda self: self.streams)
    @rule(data=st.data())
    def end(self, data):
        self.streams.pop(data.draw(st.sampled_from(sorted(self.streams)))).finish()

    @invariant()
    def nothing_is_lost(self):
        for stream in self.streams.values():
            queue = stream.queue
            assert queue.released == len(stream.left)
            assert queue.withheld == (len(stream.pushed) - len(stream.left)) * stream.halted

    def teardown(self):
        for stream in self.streams.values():
            stream.finish()


def id_of(stream):
    return stream.slot


TestInvariant1 = Engine.TestCase
TestInvariant1.settings = settings(max_examples=60, stateful_step_count=30)


def run(depth, script, *, passes_unscored=False):
    """Push and judge one token per verdict, then finish; return what left at each step."""
    queue = HoldBack(depth, passes_unscored=passes_unscored)
    left = []
    for position, verdict in enumerate(script):
        queue.push(position, position)
        left.append(queue.judge(position, verdict))
    return [*left, queue.finish()]


@pytest.mark.parametrize(
    ("depth", "script", "left"),
    [
        (1, [C, C, C], [[0], [1], [2], []]),
        (2, [C, C, C], [[], [0], [1], [2]]),
        (3, [C, C, C, C], [[], [], [0], [1], [2, 3]]),
        ("turn", [C, C, C], [[], [], [], [0, 1, 2]]),
        (1, [C, X, X], [[0], [], [], []]),
        (2, [C, C, X], [[], [0], [], []]),
        ("turn", [C, C, X], [[], [], [], []]),
        (1, [C, H, H, C], [[0], [], [], [1, 2, 3], []]),
        (2, [C, H, C, C], [[], [], [0, 1], [2], [3]]),
        (1, [H, X], [[], [], []]),
        (1, [C, H], [[0], [], []]),
        ("turn", [C, H], [[], [], []]),
        ("turn", [H, C], [[], [], [0, 1]]),
        (1, [], [[]]),
    ],
)
def test_what_leaves_when(depth, script, left):
    assert run(depth, script) == left


def test_the_last_token_was_never_fed():
    for passes, last in ((False, []), (True, [1])):
        queue = HoldBack(1, passes_unscored=passes)
        queue.push(0, 0)
        assert queue.judge(0, C) == [0]
        queue.push(1, 1)
        assert queue.finish() == last
        assert (queue.released, queue.withheld) == (1 + passes, 1 - passes)


@pytest.mark.parametrize("verdicts", [[], [H], [X]])
def test_pass_does_not_let_a_held_stream_go(verdicts):
    queue = HoldBack(1, passes_unscored=True)
    for position, verdict in enumerate(verdicts):
        queue.judge(position, verdict)
    queue.push(5, "token")
    assert queue.finish() == ([] if verdicts else ["token"])


def test_nothing_leaves_after_a_halt_whatever_comes():
    queue = HoldBack(1)
    queue.push(0, "a")
    assert queue.judge(0, X) == []
    queue.push(1, "b")
    assert queue.judge(1, C) == []
    assert queue.finish() == []
    assert (queue.released, queue.withheld) == (0, 2)


def test_nothing_leaves_after_the_end():
    queue = HoldBack(1, passes_unscored=True)
    queue.push(0, "a")
    assert queue.judge(0, C) == ["a"]
    assert queue.finish() == []
    queue.push(1, "b")
    assert queue.judge(1, C) == []
    assert queue.finish() == []
    assert (queue.released, queue.withheld) == (1, 1)


@pytest.mark.parametrize("verdict", [C, H, X])
def test_tokens_come_in_order(verdict):
    queue = HoldBack(3)
    queue.push(4, "a")
    queue.judge(4, verdict)
    for position in (3, 4):
        with pytest.raises(ValueError, match=f"position {position} does not follow 4"):
            queue.push(position, "b")
    queue.judge(6, C)
    # its residual was not among those judged: it must not leave by the judgement of 6 or 7
    with pytest.raises(ValueError, match="position 5 does not follow 6"):
        queue.push(5, "b")
    assert queue.released + queue.withheld <= 1


def test_a_verdict_is_final():
    queue = HoldBack(1)
    queue.push(2, "a")
    queue.judge(2, H)
    for position in (1, 2):
        with pytest.raises(ValueError, match=rf"position {position} was judged already .*to 2"):
            queue.judge(position, C)
    assert queue.released == 0


@pytest.mark.parametrize("depth", [0, -1])
def test_a_depth_that_lets_tokens_leave_unjudged_is_refused(depth):
    with pytest.raises(ValueError, match=f"depth {depth} would let tokens leave unjudged"):
        HoldBack(depth)
