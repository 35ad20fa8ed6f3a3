import pytest
import torch
from rounds_of import begin, layout, random_adapter

from hf_devft.federation.client_side import ClientSide, ToClient, exchange_here
from hf_devft.federation.heterogeneity.resources import ClientResources, make_resources
from hf_devft.federation.heterogeneity.staleness import late_weights
from hf_devft.federation.memory import Memory
from hf_devft.federation.methods import AGGREGATION_RULES, METHODS, SERVER_OPTIMIZERS, Clients
from hf_devft.federation.methods.fedit import FedIT
from hf_devft.federation.privacy import ClientPrivacy
from hf_devft.federation.rounds import Federation, QuorumError
from hf_devft.federation.sampling import Placement
from hf_devft.federation.selection import ClientSelection, ResourceAware
from hf_devft.federation.turns import LocalResult, one_after_another
from hf_devft.federation.wire import Wire
from hf_devft.models.layout import AdapterLayout


LAYOUT = AdapterLayout(("layers.0.lora_A.weight",), (torch.Size((1, 2)),))


def federation(
    quorum=1, retries=0, dropout_rate=0.0, clients=6, per_round=3, selection=None, resources=None
) -> Federation:
    memory, method, examples = Memory(), FedIT(), [index + 1 for index in range(clients)]
    method.begin_run(Clients(examples, memory=memory))
    selection = selection or ClientSelection()
    selection.begin_run(per_round, examples, dropout_rate, 0, resources)
    run = Federation(
        method=method,
        correction=None,
        optimizer=None,
        wire=Wire("fp32", 1.0, memory),
        memory=memory,
        selection=selection,
        placement=Placement(),
        names=[f"client-{index}" for index in range(clients)],
        quorum=quorum,
        retries=retries,
        add_up=lambda tensor: None,
        gather=lambda item: [item],
        device=torch.device("cpu"),
    )
    run.begin_stage(LAYOUT, torch.zeros(2), range(10), 0, 0.0, dict.fromkeys(range(clients), 1.0), [1.0] * clients)
    return run


def run_round(run: Federation, index: int, start: torch.Tensor, train):
    """A round whose clients are in this process, without data."""
    side = ClientSide(run.method, run.correction, run.wire)
    return run.run(index, start, lambda index, attempt, messages: exchange_here(side, train, list, messages))


def training(failing=(), infinite=(), trained=None):
    """Clients whose adapter is their own number."""

    def train_client(turn):
        client = turn.client
        if trained is not None:
            trained.append(client)
        if client in failing:
            raise RuntimeError(f"client {client} is ill")
        adapter = torch.full((2,), float("inf") if client in infinite else float(client))
        return ended(client), adapter

    return one_after_another(train_client)


def ended(client: int) -> LocalResult:
    return LocalResult(torch.tensor(float(client)), positions=(10,), padding=2, seen=5, grad_norm=None, flops=7.0)


def mean(clients) -> float:
    return sum(client * (client + 1) for client in clients) / sum(client + 1 for client in clients)


def test_the_round_of_healthy_clients():
    run = federation()
    outcome = run_round(run, 0, torch.zeros(2), training())
    assert outcome.sampled == run.selection.sampled(0)
    assert outcome.left_out == []
    assert outcome.adapter.tolist() == pytest.approx([mean(outcome.sampled)] * 2)
    assert outcome.loss == pytest.approx(sum(outcome.sampled) / 3)
    assert (outcome.bytes_down, outcome.bytes_up) == (3 * 8, 3 * 8)
    assert (outcome.tokens, outcome.padding, outcome.seen, outcome.flops, outcome.attempts) == (30, 6, 15, 21, 1)


def test_failing_clients_are_left_out_and_the_weights_renormalised(caplog):
    run = federation()
    ill, infinite, healthy = run.selection.sampled(0)
    outcome = run_round(run, 0, torch.zeros(2), training(failing=[ill], infinite=[infinite]))
    assert outcome.left_out == [ill, infinite]
    assert outcome.adapter.tolist() == [healthy] * 2
    assert (outcome.bytes_down, outcome.bytes_up) == (24, 16), "one sent nothing, one sent what could not be used"
    assert f"client-{ill} failed and was left out: RuntimeError: client {ill} is ill" in caplog.text
    assert f"client-{infinite} returned an adapter that is not finite" in caplog.text


def test_a_client_whose_update_is_absurd_keeps_nothing():
    """What the server will refuse must not stay with the client as if it had counted."""
    run = federation()
    side = ClientSide(run.method, run.correction, Wire("int4", 1.0, run.memory))
    side.wire.begin_stage(LAYOUT)
    run.method.begin_round(0, torch.zeros(2), [0])
    message = ToClient(0, 0, run.wire.down(torch.zeros(2)))
    for absurd in (1e7, float("nan")):
        answer = side.end(side.begin(message, []), (ended(0), torch.full((2,), absurd)))
        assert answer.adapter is None
        run.memory.commit()
        assert not run.memory.state_dict()
    assert side.end(side.begin(message, []), (ended(0), torch.tensor([0.3, 7.0]))).adapter is not None
    run.memory.commit()
    assert run.memory.state_dict(), "what int4 left out"


def test_a_server_optimiser_steps_from_the_start_along_the_mean():
    run = federation()
    run.optimizer = SERVER_OPTIMIZERS["fedavgm"](server_learning_rate=0.5, server_momentum=0.0)
    run.optimizer.begin_stage(LAYOUT, torch.zeros(2))
    start = torch.tensor([10.0, -10.0])
    outcome = run_round(run, 0, start, training())
    expected = [(value + mean(outcome.sampled)) / 2 for value in start.tolist()]
    assert outcome.adapter.tolist() == pytest.approx(expected)


def test_a_clients_messages_count_by_its_rank_on_the_clock():
    method, of = METHODS["flexlora"](client_ranks=[1, 4]), layout(modules=1)
    begin(method, of, [1, 1], random_adapter(of))
    assert method.message_sizes(0) == (5 + 6, 5 + 6)
    assert method.message_sizes(1) == (4 * 11, 4 * 11)


@pytest.mark.parametrize("rule", ["geometric_median", "norm_clipping"])
def test_a_client_that_claims_many_rows_does_not_outweigh_the_others(rule):
    found = []
    for claimed in (1, 10**12):
        run = federation(clients=4, per_round=4)
        run.rule = AGGREGATION_RULES[rule]()
        run.method.clients.examples[:] = [1, 1, 1, claimed]
        found.append(run_round(run, 0, torch.zeros(2), training()).adapter)
    torch.testing.assert_close(*found)
    assert found[0].tolist() != [3, 3], "the last client's own"


def test_clients_that_drop_out_do_not_train():
    run, trained = federation(dropout_rate=0.5), []
    outcome = run_round(run, 1, torch.zeros(2), training(trained=trained))
    assert trained == run.selection.training(1) == [c for c in outcome.sampled if c not in outcome.left_out]
    assert 0 < len(trained) < 3


def test_a_round_below_its_quorum_is_tried_with_others():
    run = federation(quorum=2, retries=1)
    first, second = run.selection.sampled(0), run.selection.sampled(0, attempt=1)
    outcome = run_round(run, 0, torch.zeros(2), training(failing=first[:2]))
    assert not set(first) & set(second)
    assert outcome.sampled == first + second
    assert outcome.left_out == first, "also who has answered, as it did not count"
    assert outcome.losses.keys() == set(second)
    assert outcome.adapter.tolist() == pytest.approx([mean(second)] * 2), "nothing of the first attempt stays"
    assert (outcome.attempts, outcome.bytes_down, outcome.bytes_up, outcome.tokens) == (2, 48, 32, 40)


def test_who_counts_in_a_later_attempt_was_not_left_out():
    run = federation(quorum=3, retries=1, clients=4, per_round=3)
    first, second = (set(run.selection.sampled(0, attempt)) for attempt in (0, 1))
    outcome = run_round(run, 0, torch.zeros(2), training(failing=first - second))
    assert first & second
    assert set(outcome.left_out) == first - second
    assert outcome.losses.keys() == second


def test_the_clock_runs_in_every_attempt():
    resources = make_resources(6, seed=1)
    run = federation(quorum=2, retries=1, resources=resources)
    attempts = [run.selection.sampled(0, attempt) for attempt in (0, 1)]
    outcome = run_round(run, 0, torch.zeros(2), training(failing=attempts[0][:2]))
    needed = [max(map(run.selection.seconds_of, sampled)) for sampled in attempts]
    assert outcome.seconds == run.clock.time == pytest.approx(sum(needed))
    assert min(needed) > 0
    resumed = federation(quorum=2, retries=1, resources=resources)
    resumed.begin_stage(LAYOUT, torch.zeros(2), range(10), 1, outcome.seconds, dict.fromkeys(range(6), 1.0), [1.0] * 6)
    assert resumed.clock.time == run.clock.time


def test_a_rule_of_too_few_updates_leaves_the_adapter():
    """Which a private run takes, as no round of it is tried again."""
    run = federation(quorum=5, clients=6, per_round=5)
    run.rule, run.is_private = AGGREGATION_RULES["multi_krum"](), True
    run.selection.training = lambda round_index, attempt=0: run.selection.sampled(round_index, attempt)[:1]
    start = torch.tensor([3.0, 4.0])
    assert torch.equal(run_round(run, 0, start, training()).adapter, start)


def test_an_attempt_below_the_quorum_leaves_nothing_with_its_clients():
    """What int4 left out of a message that did not count is not added to the next one."""
    run, fresh = federation(quorum=2, retries=1), federation()
    for each in (run, fresh):
        each.wire = Wire("int4", 1.0, each.memory)
        each.wire.begin_stage(LAYOUT)
    first, second = run.selection.sampled(0), run.selection.sampled(0, attempt=1)

    def train(turn):
        return ended(turn.client), torch.tensor([0.3 + turn.client, 7.0])

    def fails_at_first(turn):
        if turn.client in first[:2]:
            raise RuntimeError("ill")
        return train(turn)

    tried_again = run_round(run, 0, torch.zeros(2), one_after_another(fails_at_first))
    fresh.selection.sampled = lambda round_index, attempt=0: second
    fresh.selection.training = fresh.selection.sampled
    at_once = run_round(fresh, 0, torch.zeros(2), one_after_another(train))
    assert torch.equal(tried_again.adapter, at_once.adapter)
    states = [each.memory.state_dict() for each in (run, fresh)]
    assert states[0].keys() == states[1].keys()
    assert states[0]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_without_quorum_the_first_error_is_the_cause():
    run = federation(quorum=1, retries=2)
    with pytest.raises(
        QuorumError, match=r"3 attempts.*resume_from_checkpoint.*The first error: \w+: client \d is ill"
    ) as error:
        run_round(run, 0, torch.zeros(2), training(failing=range(6)))
    assert str(error.value.__cause__) == f"client {run.selection.sampled(0)[0]} is ill"


def test_processes_put_their_clients_together():
    """Three processes take turns in this one: what each adds up is what the others left."""
    alone = run_round(federation(), 0, torch.zeros(2), training())
    shared: list[list[torch.Tensor]] = []

    def recorder(tensor):
        shared[-1].append(tensor.clone())

    runs = [federation() for _ in range(3)]
    for index, run in enumerate(runs):
        run.placement, run.add_up = Placement("client_parallel", index, 3), recorder
        shared.append([])
        run.quorum = 0
        run_round(run, 0, torch.zeros(2), training())
    reports, sums = (sum(part[index] for part in shared) for index in range(2))
    assert reports[:, 0].tolist() == [8, 8, 8]
    assert (sums[:-1] / sums[-1]).float().tolist() == alone.adapter.tolist()


def test_updates_that_come_late_count_where_they_arrive():
    """Client k needs k seconds, a round waits for the first one of three."""
    resources = [ClientResources(flops_per_second=1 / (client + 1)) for client in range(6)]
    run = federation(selection=ResourceAware(wait_for=0.3), resources=resources)
    adapter, changes, late, clock = torch.zeros(2), {}, 0, 0.0

    def train(turns):
        for turn, (result, trained) in training()(turns):
            changes[turn.client] = trained - turn.start
            yield turn, (result, trained)

    for index in range(10):
        before = dict(changes)
        arriving = run.selection.arrivals(index)
        outcome = run_round(run, index, adapter, train)
        clock += outcome.seconds
        late += len(outcome.late)
        fresh = [c for c in outcome.sampled if c not in outcome.late and c not in outcome.left_out]
        mean = sum(changes[c] * (c + 1) for c in fresh) / sum(c + 1 for c in fresh)
        ages = [index - begun for begun in arriving.values()]
        weights = (
            late_weights([mean] * len(arriving), len(fresh), [before[c] for c in arriving], ages) if arriving else []
        )
        total = [(changes[c], c + 1) for c in fresh]
        total += [(before[c], (c + 1) * weight) for c, weight in zip(arriving, weights, strict=True)]
        expected = adapter + sum(change * w for change, w in total) / sum(w for _, w in total)
        torch.testing.assert_close(outcome.adapter, expected, rtol=1e-5, atol=1e-5)
        adapter = outcome.adapter
    assert late > 0
    assert clock == pytest.approx(run.clock.time)


def test_a_stage_goes_on_at_the_same_time():
    resources = make_resources(6, seed=1)
    whole = federation(selection=ResourceAware(), resources=resources)
    adapter = torch.zeros(2)
    for index in range(10):
        if index == 4:
            saved, half, elapsed = whole.state_dict(), adapter, whole.clock.time
        adapter = run_round(whole, index, adapter, training()).adapter
    resumed = federation(selection=ResourceAware(), resources=resources)
    resumed.memory.load_state_dict(saved)
    resumed.begin_stage(LAYOUT, half, range(10), 4, elapsed, dict.fromkeys(range(6), 1.0), [1.0] * 6)
    for index in range(4, 10):
        half = run_round(resumed, index, half, training()).adapter
    assert torch.equal(half, adapter)
    assert resumed.clock.time == whole.clock.time


def test_a_second_secure_sum_of_a_round_is_not_asked_for():
    """The difference between the two would be single clients' updates."""
    for sees_sums_only, attempts in ((True, 1), (False, 3)):
        run, asked = federation(quorum=3, retries=2), []
        run.sees_sums_only = sees_sums_only
        with pytest.raises(QuorumError, match=f"in {attempts} attempts"):
            run_round(run, 0, torch.zeros(2), training(failing=(0, 1, 2, 3), trained=asked))
        assert len(asked) == 3 * attempts
    run = federation(quorum=3, retries=2)
    run.sees_sums_only = True
    with pytest.raises(QuorumError, match="in 3 attempts"):  # of no client there was a sum
        run_round(run, 0, torch.zeros(2), training(failing=range(6)))


def test_a_private_round_in_which_nobody_answers_is_released():
    """A run that ended would tell who was drawn."""
    start = torch.zeros(2)
    run = federation()
    run.is_private, run.privacy = True, ClientPrivacy(1.0, 1.0, 3, 1, run.memory)
    assert not torch.equal(run_round(run, 0, start, training(failing=range(6))).adapter, start), "the noise"
    run.quorum = 2
    with pytest.raises(QuorumError):
        run_round(run, 1, start, training(failing=range(6)))


def test_a_private_round_that_everyone_has_left_counts():
    """Nobody else is asked, as that would cost."""
    start = torch.tensor([1.0, 2.0])
    for is_private in (True, False):
        run = federation(dropout_rate=0.999)
        run.is_private = is_private
        if is_private:
            assert torch.equal(run_round(run, 0, start, training()).adapter, start)
        else:
            with pytest.raises(QuorumError, match="Raise `clients_per_round`, or lower `round_quorum`"):
                run_round(run, 0, start, training())
