"""The scheduler's rules, over random crowds of requests: who reads, who waits, who gives way. No model is needed."""

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from GPT2Model.sampling import Sampling
from orchestrator.serving.block_manager import BlockManager
from orchestrator.serving.request import Request, Sample
from orchestrator.serving.scheduler import Plan, Scheduler

NO_LOGITS = torch.zeros(2)  # nobody asks for log-probabilities here
STEM = [0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 0, 1]


def request(number: int, prompt: list[int], new_tokens: int, n: int = 1) -> Request:
    return Request(number, prompt, new_tokens, Sampling(temperature=1.0), n, (), set(), None, None)


@dataclass
class Customer:
    """One request of a crowd. arrives, leaves: before which step; leaves None: it stays to the end."""

    prompt: list[int]
    new_tokens: int
    n: int
    arrives: int
    leaves: int | None


@dataclass
class Crowd:
    customers: list[Customer]
    num_blocks: int
    block_size: int
    max_running: int
    max_batch_tokens: int
    prefix_sharing: bool


@st.composite
def crowds(draw) -> Crowd:
    """Pools that just hold the largest request alone, so that the others must give way."""
    max_running = draw(st.integers(1, 6))
    customers = [
        Customer(
            STEM[: draw(st.integers(1, 13))] + draw(st.lists(st.integers(0, 1), max_size=2)),
            draw(st.integers(1, 12)),
            min(draw(st.sampled_from([1, 1, 1, 2, 3])), max_running),
            draw(st.integers(0, 10)),
            draw(st.sampled_from([None, None, None, 3, 7, 15])),
        )
        for _ in range(draw(st.integers(1, 9)))
    ]
    block_size = draw(st.integers(1, 5))
    least = max(-(-(len(one.prompt) + one.new_tokens - 1) // block_size) for one in customers)
    return Crowd(
        sorted(customers, key=lambda one: one.arrives),  # they are numbered as they come
        least + draw(st.integers(0, 6)),
        block_size,
        max_running,
        max_running + draw(st.integers(0, 6)),
        draw(st.sampled_from([True, True, True, False])),
    )


class Shop:
    """What the engine does around its scheduler, with a model that writes 0 and 1 in turn."""

    def __init__(self, crowd: Crowd):
        self.blocks = BlockManager(crowd.num_blocks, crowd.block_size, crowd.prefix_sharing)
        self.scheduler = Scheduler(self.blocks, crowd.max_running, crowd.max_batch_tokens)
        self.open: dict[int, list[Sample]] = {}
        self.ended: list[Sample] = []
        self.met = Counter()

    def come(self, asked: Request) -> None:
        sample = Sample(asked, 0, None, "cpu")
        sample.to_fork = asked.n - 1
        self.open[asked.number] = [sample]
        self.scheduler.add(sample)

    def leave(self, number: int) -> None:
        for sample in self.open.get(number, []):
            if sample.finish_reason is None:
                sample.cancel()
                self.scheduler.remove(sample)
                self.met["cancelled"] += 1

    def step(self) -> Plan:
        running, waiting = list(self.scheduler.running), list(self.scheduler.waiting)
        unread = {sample: sample.unread for sample in running}
        plan = self.scheduler.plan()
        check_plan(self.scheduler, plan, running, waiting, unread)
        self.blocks.check()
        self.met["preempted"] += len(plan.preempted)
        self.met["copied"] += len(plan.copies)
        self.met["shared"] += plan.shared_tokens
        for sample, _ in plan.reads:
            self.met["chunked"] += sample.unread > 0
            if sample.unread:
                continue
            forks = [Sample(sample.request, i, None, "cpu") for i in range(1, sample.to_fork + 1)]
            sample.to_fork = 0
            for other in forks:
                self.open[sample.request.number].append(other)
                self.scheduler.fork(sample, other)
            for one in (sample, *forks):
                one.sampler.pick = lambda logits, tokens, one=one: (len(tokens) + one.index) % 2
                one.write(NO_LOGITS, 0)
                if one.finish_reason is not None:
                    self.scheduler.remove(one)
                    self.ended.append(one)
        return plan


def in_order(samples: list[Sample]) -> bool:
    return [one.arrived for one in samples] == sorted(one.arrived for one in samples)


def check_plan(scheduler: Scheduler, plan: Plan, running: list, waiting: list, unread: dict) -> None:
    """Everything that holds of every step. running, waiting, unread: as they were before it."""
    counts = dict(plan.reads)
    assert sum(counts.values()) <= scheduler.max_batch_tokens, "more was read than the budget allows"
    assert len(counts) == len(plan.reads)
    assert all(count >= 1 for count in counts.values())
    stayed = [one for one in running if one not in plan.preempted]
    assert all(one in counts for one in stayed), "a running sequence did not advance"

    # Who gives way is who came last; the oldest never does. Who gave way waits, with all it has written.
    assert plan.preempted == running[len(stayed) :][::-1]
    assert bool(stayed) == bool(running), "the oldest was preempted"
    assert all(one in scheduler.waiting and one.table is None for one in plan.preempted)

    # Admission: the first of those who waited, nobody overtaken, and nobody while others have to go.
    admitted = [one for one in scheduler.running if one not in running]
    assert admitted == waiting[: len(admitted)]
    assert not (admitted and plan.preempted)
    assert len(scheduler.running) + sum(one.to_fork for one in scheduler.running) <= scheduler.max_running
    assert admitted or running or not waiting, "nothing runs, and nobody was admitted"
    assert in_order(scheduler.running)
    assert in_order(scheduler.waiting)
    assert in_order([*scheduler.running, *scheduler.waiting])

    # The budget goes to who came first: behind a sequence that was cut short, everybody reads just one token.
    cut = [position for position, one in enumerate(stayed) if counts[one] < unread[one]]
    assert all(counts[one] == 1 for one in stayed[cut[0] + 1 :]) if cut else True
    assert not (cut and admitted)
    if cut and not plan.preempted:
        assert sum(counts.values()) == scheduler.max_batch_tokens, "a prompt was cut though there was room in the step"
    assert all(one.unread == 0 for one in admitted[:-1])


def serve(crowd: Crowd) -> Counter:
    shop, step = Shop(crowd), 0
    longest = sum(one.n * (len(one.prompt) + one.new_tokens) for one in crowd.customers)
    while True:
        for number, customer in enumerate(crowd.customers):
            if customer.arrives == step:
                shop.come(request(number, customer.prompt, customer.new_tokens, customer.n))
            if customer.leaves == step:
                shop.leave(number)
        plan = shop.step()
        step += 1
        if not plan.reads and step > 16:
            break
        # The oldest advances in every step, so each sequence needs no more steps than it has tokens, once it is oldest.
        assert step <= 16 + longest + 1, "the requests do not come to an end"
    for number, customer in enumerate(crowd.customers):
        if customer.leaves is None:
            assert len(shop.open[number]) == customer.n
            assert all(len(one.text.ids) == customer.new_tokens for one in shop.open[number])
    assert shop.blocks.free_blocks == crowd.num_blocks
    shop.blocks.check()
    return shop.met


def serve_many(count: int) -> Counter:
    met = Counter()

    @settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(crowds())
    def run(crowd):
        met.update(serve(crowd))

    run()
    return met


def test_the_rules_hold_in_every_step_and_everybody_is_served():
    met = serve_many(150)
    assert all(met[name] > 5 for name in ("preempted", "copied", "shared", "chunked", "cancelled")), met


@pytest.mark.slow
def test_the_rules_hold_over_thousands_of_crowds():
    met = serve_many(4000)
    assert all(met[name] > 500 for name in ("preempted", "copied", "shared", "chunked", "cancelled")), met


def shop(num_blocks: int, block_size: int = 4, max_running: int = 4, max_batch_tokens: int = 8, sharing: bool = False):
    return Shop(Crowd([], num_blocks, block_size, max_running, max_batch_tokens, sharing))


def reads(plan: Plan) -> list[tuple[int, int]]:
    return [(sample.request.number, count) for sample, count in plan.reads]


def test_a_long_prompt_is_read_in_chunks_while_the_others_go_on_writing():
    one = shop(20)
    one.come(request(0, [1, 2], 9))
    one.come(request(1, [3] * 20, 2))
    steps = [reads(one.step()) for _ in range(4)]
    assert steps == [[(0, 2), (1, 6)], [(0, 1), (1, 7)], [(0, 1), (1, 7)], [(0, 1), (1, 1)]]


def test_who_came_last_gives_way_and_comes_back_with_what_it_wrote():
    one = shop(6, max_batch_tokens=16)
    one.come(request(0, [1] * 7, 9))  # 2 blocks, at the end 4
    one.come(request(1, [2] * 7, 9))
    plans = [one.step() for _ in range(3)]
    assert [len(plan.preempted) for plan in plans] == [0, 0, 0]
    while not plans[-1].preempted:
        plans.append(one.step())
    assert [sample.request.number for sample in plans[-1].preempted] == [1]
    (waiting,) = one.scheduler.waiting
    written = list(waiting.text.ids)
    assert len(written) > 0
    while one.scheduler.waiting:
        plans.append(one.step())
    read_again = dict(reads(plans[-1]))[1]
    assert read_again == 7 + len(written)
    while plans[-1].reads:
        plans.append(one.step())
    assert waiting.text.ids[: len(written)] == written
    assert [len(sample.text.ids) for sample in one.ended] == [9, 9]
    assert one.ended[0].request.number == 0


def test_a_large_request_is_not_overtaken_by_a_small_one_behind_it():
    one = shop(6)
    one.come(request(0, [1] * 12, 4))
    one.come(request(1, [2] * 16, 4))  # 4 blocks: waits until the first has gone
    one.come(request(2, [3], 1))  # would fit at once
    one.step(), one.step()
    assert [sample.request.number for sample in one.scheduler.running] == [0]
    assert [sample.request.number for sample in one.scheduler.waiting] == [1, 2]


@pytest.mark.parametrize(("num_blocks", "running"), [(4, [0]), (5, [0, 1])])
def test_a_free_block_is_left_for_each_that_runs(num_blocks, running):
    """The second would fit into four blocks just so, and be thrown out again as soon as the first needs its third."""
    one = shop(num_blocks, max_batch_tokens=16)
    one.come(request(0, [1] * 7, 9))  # 2 blocks
    one.come(request(1, [2] * 7, 9))  # 2 blocks
    one.step()
    assert [sample.request.number for sample in one.scheduler.running] == running


def test_places_are_kept_for_samples_that_are_still_to_fork():
    one = shop(20, max_running=3)
    one.come(request(0, [1, 2, 3], 3, n=2))
    one.come(request(1, [1, 2, 3], 3, n=2))  # 2 + 2 are more than 3
    one.step()
    assert [sample.request.number for sample in one.scheduler.running] == [0, 0]
    assert [sample.request.number for sample in one.scheduler.waiting] == [1]


def test_equal_prompts_in_one_step_are_read_once():
    one = shop(20, max_batch_tokens=30, sharing=True)
    for number in range(3):
        one.come(request(number, [*range(9)], 2))
    plan = one.step()
    assert reads(plan) == [(0, 9), (1, 1), (2, 1)]
    assert plan.shared_tokens == 16


@pytest.mark.parametrize(("max_running", "max_batch_tokens"), [(0, 4), (5, 4)])
def test_sizes_that_contradict_each_other_are_refused(max_running, max_batch_tokens):
    with pytest.raises(ValueError, match="at most max_batch_tokens"):
        Scheduler(BlockManager(4, 4), max_running, max_batch_tokens)
