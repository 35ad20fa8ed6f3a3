"""Each adapter method against the equation that defines it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rounds_of import begin, layout, mean_products, products, random_adapter, round_of

from hf_devft.federation.client_side import ClientSide, ToClient
from hf_devft.federation.memory import SERVER, Memory
from hf_devft.federation.methods import METHODS, make_methods
from hf_devft.federation.turns import LocalResult
from hf_devft.federation.wire import Wire
from hf_devft.models.layout import RESIDUAL, A, B


EXAMPLES = [3, 1, 4]


def trained(client: int, start: torch.Tensor) -> torch.Tensor:
    """What a client makes of its start: something else for every client."""
    return start + random_adapter(layout(), seed=client + 1)


def run(name: str, rounds: int = 1, sampled=(0, 1, 2), start=None, **options):
    method, of = METHODS[name](**options), layout()
    adapter = random_adapter(of) if start is None else start
    begin(method, of, EXAMPLES, adapter)
    for index in range(rounds):
        adapter = round_of(method, index, adapter, list(sampled), trained)
    return method, adapter


def mean(vectors, weights=EXAMPLES) -> torch.Tensor:
    return sum(w * v.double() for w, v in zip(weights, vectors, strict=True)).float() / sum(weights)


def test_fedit_is_the_mean_weighted_by_examples():
    start = random_adapter(layout())
    _, adapter = run("fedit", start=start)
    torch.testing.assert_close(adapter, mean([trained(client, start) for client in range(3)]))


@given(seed=st.integers(0, 999), examples=st.lists(st.integers(1, 10_000), min_size=1, max_size=8))
def test_fedit_of_equal_adapters_is_that_adapter_and_order_does_not_matter(seed, examples):
    of, clients = layout(), list(range(len(examples)))
    method, start = METHODS["fedit"](), random_adapter(layout(), seed)
    begin(method, of, examples, start)
    assert torch.equal(round_of(method, 0, start, clients, lambda client, start: start), start)
    there, back = (round_of(method, 0, start, order, trained) for order in (clients, clients[::-1]))
    assert torch.equal(there, back)


def test_ffa_lora_never_moves_a_and_its_mean_is_exact():
    start = random_adapter(layout())
    method, adapter = run("ffa_lora", start=start)
    of = method.layout
    assert torch.equal(of.pick(adapter, of.named(A)), of.pick(start, of.named(A)))
    assert method.download(0).numel() == method.payload(0, adapter).numel() == sum(of.sizes[i] for i in of.named(B))
    clients = [start.clone() for _ in range(3)]
    for client, vector in enumerate(clients):
        of.put(vector, of.named(B), of.pick(trained(client, start), of.named(B)))
    for ours, exact in zip(products(of, adapter), mean_products(of, clients, EXAMPLES), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["hetlora", "flexlora", "hlora"])
def test_what_the_wire_rounds_off_on_its_way_to_clients_is_not_lost_at_the_server(name):
    """Clients that learn nothing change nothing."""
    of, method, wire = layout(), METHODS[name](client_ranks=[4]), Wire("int4", 1.0, Memory())
    adapter = random_adapter(of)
    begin(method, of, EXAMPLES, adapter)
    method.begin_round(0, adapter, [0, 1, 2])
    for client in range(3):
        start = method.start(client, wire.down(method.download(client)).decoded)
        assert not torch.allclose(start, adapter, atol=0.01)
        method.keep(client, start, start)
        method.receive(client, start, method.payload(client, start))
    for new, old in zip(products(of, method.end_round()), products(of, adapter), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-4)


def test_fedsa_lora_never_sends_b_and_clients_go_on_with_theirs():
    start = random_adapter(layout())
    method, first = run("fedsa_lora", start=start)
    of = method.layout
    assert method.sends(1) == method.receives(1) == of.named(A)
    assert method.payload(1, first).numel() == sum(of.sizes[place] for place in of.named(A))
    starts = {}
    second = round_of(method, 1, first, [1], lambda client, start: starts.setdefault(client, start) + 1)
    own_b = of.pick(trained(1, start), of.named(B))
    torch.testing.assert_close(of.pick(starts[1], of.named(B)), own_b)
    torch.testing.assert_close(of.pick(starts[1], of.named(A)), of.pick(first, of.named(A)))
    # What is published: B as the mean over all that have trained, of which client 1 now has another.
    means = [of.pick(trained(client, start), of.named(B)) for client in range(3)]
    torch.testing.assert_close(of.pick(first, of.named(B)), mean(means), rtol=1e-5, atol=1e-5)
    means[1] = own_b + 1
    torch.testing.assert_close(of.pick(second, of.named(B)), mean(means), rtol=1e-5, atol=1e-5)


def test_a_client_of_fedsa_lora_that_never_trained_starts_from_the_first_b():
    start = random_adapter(layout())
    method, adapter = run("fedsa_lora", start=start, sampled=[0, 1])
    method.begin_round(1, adapter, [2])
    of = method.layout
    fresh = method.start(2, method.download(2))
    assert torch.equal(of.pick(fresh, of.named(B)), of.pick(start, of.named(B)))


def test_rolora_takes_turns():
    start = random_adapter(layout())
    method, first = run("rolora", start=start)
    of = method.layout
    assert torch.equal(of.pick(first, of.named(A)), of.pick(start, of.named(A)))
    second = round_of(method, 1, first, [0, 1, 2], trained)
    assert torch.equal(of.pick(second, of.named(B)), of.pick(first, of.named(B)))
    assert not torch.equal(of.pick(second, of.named(A)), of.pick(first, of.named(A)))


def test_floras_aggregate_is_the_weighted_sum_of_the_products():
    sent = {}
    method, of = METHODS["flora"](), layout()
    start = random_adapter(of)
    begin(method, of, EXAMPLES, start)

    def train(client, start):
        assert all(not product.any() for product in products(of, start)), "a client starts from nothing"
        return sent.setdefault(client, trained(client, start))

    for index in range(2):
        before = method.residual()
        adapter = round_of(method, index, start, [0, 1, 2], train)
        exact = mean_products(of, [sent[client] for client in range(3)], EXAMPLES)
        for pair, product in zip(of.pairs, exact, strict=True):
            key = pair.module + RESIDUAL
            added = method.residual()[key] - before.get(key, torch.zeros(()))
            torch.testing.assert_close(added.double(), product, rtol=1e-5, atol=1e-5)
        sent.clear()
    assert all(not product.any() for product in products(of, adapter))


def test_flora_sends_what_a_client_has_not_had():
    wide, method = layout(rank=2, into=60, out=50), METHODS["flora"]()
    begin(method, wide, EXAMPLES, random_adapter(wide))
    planned = method.message_sizes(2)
    adapter = round_of(method, 0, random_adapter(wide), [0, 1], lambda client, start: start + 1)
    per_rank = sum(wide.shapes[pair.a][1] + wide.shapes[pair.b][0] for pair in wide.pairs)
    method.begin_round(1, adapter, [0, 2])
    assert method.download(2).numel() == 2 * 2 * per_rank
    assert method.message_sizes(2) == planned, "a run that goes on plans as it did at the stage's start"
    assert method.download(0).numel() == 2 * per_rank, "the other's ranks, its own it has"
    round_of(method, 1, adapter, [0], lambda client, start: start + 1)
    assert method.download(0).numel() == 0, "nothing since but its own"
    assert method.download(1).numel() == 2 * 2 * per_rank


def test_flora_sends_no_more_than_the_product():
    method, adapter = run("flora", sampled=[0, 1])
    of = method.layout
    method.begin_round(1, adapter, [0, 2])
    assert method.download(2).numel() == sum(of.shapes[pair.a][1] * of.shapes[pair.b][0] for pair in of.pairs)


def test_fedex_lora_is_exact():
    start = random_adapter(layout())
    method, adapter = run("fedex_lora", start=start)
    of, clients = method.layout, [trained(client, start) for client in range(3)]
    torch.testing.assert_close(adapter, mean(clients))
    exact = mean_products(of, clients, EXAMPLES)
    for pair, ours, product in zip(of.pairs, products(of, adapter), exact, strict=True):
        torch.testing.assert_close(
            (ours + method.residual()[pair.module + RESIDUAL]).double(), product, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("name", ["flexlora", "hlora"])
def test_flexlora_is_the_best_approximation_of_the_mean_product(name):
    method, adapter = run(name, client_ranks=[1, 2, 4])
    of = method.layout
    method.begin_round(0, random_adapter(of), [0, 1, 2])
    clients = [
        method.unpacked(client, method.payload(client, trained(client, method.start(client, method.download(client)))))
        for client in range(3)
    ]
    for ours, exact in zip(products(of, adapter), mean_products(of, clients, EXAMPLES), strict=True):
        u, s, v = torch.linalg.svd(exact)
        best = u[:, :4] * s[:4] @ v[:4]
        torch.testing.assert_close(ours.double(), best, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["flexlora", "hlora"])
def test_ranks_that_clients_left_empty_can_be_trained(name):
    method, adapter = run(name, sampled=[0], client_ranks=[1, 4])
    parts = method.layout.cut(adapter)
    for pair in method.layout.pairs:
        assert (parts[pair.a].norm(dim=1) > 0.1).all(), "a rank with A = 0 and B = 0 has no gradient"
        assert not parts[pair.b][:, 1:].abs().gt(1e-5).any()


@pytest.mark.parametrize("name", ["flexlora", "hlora", "hetlora"])
def test_clients_of_lower_rank_have_zeros_beyond_it_and_send_less(name):
    method, adapter = run(name, client_ranks=[1, 2, 4])
    of = method.layout
    method.begin_round(1, adapter, [0, 1, 2])
    for client, rank in enumerate([1, 2, 4]):
        start = method.start(client, method.download(client))
        for pair in of.pairs:
            parts = of.cut(start)
            assert parts[pair.a][:rank].any()
            assert not parts[pair.a][rank:].any()
            assert not parts[pair.b][:, rank:].any()
        assert method.payload(client, adapter).numel() == sum(of.sizes) * rank // 4


def test_hetlora_weighs_by_the_products_norms():
    start = random_adapter(layout())
    method, adapter = run("hetlora", start=start, client_ranks=[2, 4, 4], gamma=0.5)
    of = method.layout
    method.begin_round(0, start, [0, 1, 2])
    clients = []
    for client in range(3):
        begun = method.start(client, start[method._rank_of_value < [2, 4, 4][client]])
        rank = method.rank(client)
        full = trained(client, begun)
        clients.append(torch.where(method._rank_of_value < rank, full, 0.0))
    for pair in of.pairs:
        norms = [(of.cut(x)[pair.b] @ of.cut(x)[pair.a]).norm().item() for x in clients]
        for place in (pair.a, pair.b):
            torch.testing.assert_close(of.cut(adapter)[place], mean([of.cut(x)[place] for x in clients], norms))


def test_hetlora_drops_a_tail_that_shrinks():
    of, start = layout(), random_adapter(layout())
    method = METHODS["hetlora"](client_ranks=[4], gamma=0.5)
    begin(method, of, [1, 1], start)
    adapter = round_of(method, 0, start, [0, 1], lambda client, start: start * (0.5 if client == 0 else 2.0))
    assert method.rank(0) == 2, "half of its ranks"
    assert method.rank(1) == 4
    assert method.payload(0, adapter).numel() == sum(of.sizes) // 2


def test_what_hetlora_prunes_is_neither_sent_nor_counted_in_the_round_that_prunes_it():
    of, start = layout(), random_adapter(layout())
    method = METHODS["hetlora"](client_ranks=[4], gamma=0.5)
    begin(method, of, [1], start)
    method.begin_round(0, start, [0])
    side = ClientSide(method, None, wire := Wire("fp32", 1.0, method.memory))
    wire.begin_stage(of)
    message = ToClient(0, 0, wire.down(method.download(0)))
    turn = side.begin(message, [])
    result = LocalResult(torch.tensor(1.0), positions=(1,), padding=0, seen=0, grad_norm=None, flops=0.0)
    answer = side.end(turn, (result, turn.start * 0.5))
    assert method.rank(0) == 2
    assert answer.count == answer.adapter.decoded.numel() == sum(of.sizes) // 2
    torch.testing.assert_close(method.start(0, message.adapter.decoded), start, msg="what it was sent has four ranks")


def test_hetloras_penalty_is_the_gradient_of_the_norms():
    of = layout()
    method = METHODS["hetlora"](client_ranks=[4], gamma=0.5, prune_weight=0.3)
    adapter = random_adapter(of).requires_grad_()
    begin(method, of, [1], adapter.detach())
    method.begin_round(0, adapter.detach(), [0])
    norms = sum(of.cut(adapter)[p.a][2:].norm() * of.cut(adapter)[p.b][:, 2:].norm() for p in of.pairs)
    (0.3 * norms).backward()
    torch.testing.assert_close(method.local_gradient(0, adapter.detach(), adapter.detach()), adapter.grad)


def test_droppeft_averages_each_layer_over_the_clients_that_had_it():
    start = random_adapter(layout(modules=6))
    method, of = METHODS["droppeft"](drop_rate=0.5), layout(modules=6)
    begin(method, of, EXAMPLES, start)
    change = lambda client, start: start + client + 1  # noqa: E731
    adapter = round_of(method, 0, start, [0, 1, 2], change)
    skipped = [set(method.skips(client)) for client in range(3)]
    assert skipped == [set(method.skips(client)) for client in range(3)], "the same, whenever it is asked"
    assert any(skipped)
    assert len({frozenset(layers) for layers in skipped}) > 1
    for place in of.all:
        there = [client for client in range(3) if of.layers[place] not in skipped[client]]
        moved = mean([torch.tensor(client + 1.0) for client in there], [EXAMPLES[c] for c in there]) if there else 0.0
        torch.testing.assert_close(of.cut(adapter)[place], of.cut(start)[place] + moved)
    assert method.payload(0, adapter).numel() == sum(of.sizes) * (6 - len(skipped[0])) // 6


def test_droppeft_never_drops_all_layers():
    method = METHODS["droppeft"](drop_rate=0.99)
    begin(method, layout(modules=3), [1] * 50, random_adapter(layout(modules=3)))
    method.begin_round(0, random_adapter(layout(modules=3)), range(50))
    assert {len(method.skips(client)) for client in range(50)} == {2}


def test_the_hypernetwork_learns_each_clients_adapter():
    """One client after the other: what it trained is what it is given the next time."""
    of = layout()
    method = METHODS["c2a"](embedding_size=8)
    start = random_adapter(of)
    begin(method, of, EXAMPLES, start)
    method.begin_round(0, start, [0])
    torch.testing.assert_close(method.download(0), start), "all start alike"
    adapter = round_of(method, 0, start, [0], trained)
    method.begin_round(1, adapter, [0, 1])
    torch.testing.assert_close(method.download(0), trained(0, start))
    other, towards = method.download(1) - start, trained(0, start) - start
    cosine = torch.nn.functional.cosine_similarity(other, towards, dim=0)
    assert cosine.abs() == pytest.approx(1, abs=1e-5), "others move with it, as far as they are alike"
    assert method.num_extra_values == 8


def test_domains_learn_apart_and_share_what_is_important_to_all():
    of, start = layout(modules=4), random_adapter(layout(modules=4))
    examples = [2, 1, 5, 1]
    method = METHODS["dofit"](domains=2, shared=0.5)
    begin(method, of, examples, start)
    method.domain_of[:] = [0, 0, 1, 1]
    method._share = torch.tensor([3 / 9, 6 / 9], dtype=torch.float64)
    big = {pair.a for pair in of.pairs[:2]} | {pair.b for pair in of.pairs[:2]}

    def train(client, start):
        parts = [
            part + (9.0 if place in big else 0.1) * (1 + (client > 1)) for place, part in enumerate(of.cut(start))
        ]
        return torch.cat([part.flatten() for part in parts])

    adapter = round_of(method, 0, start, [0, 1, 2, 3], train)
    one, two = (of.flat(method.memory.get(SERVER, f"domain-{domain}")) for domain in (0, 1))
    shared, own = sorted(big), sorted(set(of.all) - big)
    assert method.common([one, two]) == tuple(shared)
    expected = [train(client, start) for client in (0, 2)]  # the clients of a domain trained alike
    common = of.pick(expected[0] / 3 + expected[1] * 2 / 3, shared)
    torch.testing.assert_close(of.pick(one, shared), common, rtol=1e-5, atol=1e-5)
    for domain, vector in enumerate((one, two)):
        torch.testing.assert_close(of.pick(vector, own), of.pick(expected[domain], own))
    torch.testing.assert_close(adapter, one / 3 + two * 2 / 3)


def test_a_domain_does_not_go_against_its_own_step():
    from hf_devft.federation.methods.dofit import without_conflict

    step = torch.tensor([1.0, 0.0])
    assert without_conflict(torch.tensor([-2.0, 3.0]), step).tolist() == [0, 3]
    assert without_conflict(torch.tensor([2.0, 3.0]), step).tolist() == [2, 3]


@pytest.mark.parametrize("name", METHODS)
def test_processes_put_their_clients_together(name):
    """Three processes take turns in this one: what each adds up is what the others left."""
    of, start = layout(), random_adapter(layout())
    _, alone = run(name, start=start)
    methods, shared = [], []
    for client in range(3):
        method = METHODS[name]()
        begin(method, of, EXAMPLES, start)
        method.begin_round(0, start, [0, 1, 2])
        begun = method.start(client, method.download(client))
        new = begun.clone()
        of.put(new, method.trains(client), of.pick(trained(client, begun), method.trains(client)))
        method.keep(client, begun, new)
        method.receive(client, begun, method.payload(client, new))
        method.merge(shared.append)
        methods.append(method)
    total = torch.stack([tensor.clone() for tensor in shared]).sum(0)
    shared[0].copy_(total)
    assert torch.equal(methods[0].end_round(), alone)


@pytest.mark.parametrize("name", METHODS)
def test_a_round_that_is_tried_again_leaves_nothing(name):
    of, start = layout(), random_adapter(layout())
    _, once = run(name, start=start)
    method = METHODS[name]()
    begin(method, of, EXAMPLES, start)
    method.begin_round(0, start, [0, 1])
    for client in (0, 1):
        begun = method.start(client, method.download(client))
        method.keep(client, begun, begun * 9)
        method.receive(client, begun, method.payload(client, begun * 9))
    method.memory.rollback()
    assert torch.equal(round_of(method, 0, start, [0, 1, 2], trained), once)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("droppeft", {"drop_rate": 1.0}, "below 1"),
        ("hetlora", {"gamma": 1.0}, "0 < gamma < 1"),
        ("c2a", {"embedding_size": 0}, "1 or more"),
        ("dofit", {"domains": 0}, "1 domain or more"),
    ],
)
def test_options_that_make_no_sense(name, options, message):
    with pytest.raises(ValueError, match=message):
        METHODS[name](**options)


def test_ranks_beyond_loras():
    with pytest.raises(ValueError, match=r"client_ranks=\[8\].*r=4"):
        begin(METHODS["flexlora"](client_ranks=[8]), layout(), [1], random_adapter(layout()))


def test_fedex_sends_what_the_adapter_and_the_residual_can_be_made_of():
    wide, method = layout(rank=2, into=60, out=50), METHODS["fedex_lora"]()
    begin(method, wide, EXAMPLES, random_adapter(wide))
    whole = random_adapter(wide).numel()
    per_rank = sum(wide.shapes[pair.a][1] + wide.shapes[pair.b][0] for pair in wide.pairs)
    dense = sum(wide.shapes[pair.a][1] * wide.shapes[pair.b][0] for pair in wide.pairs)
    adapter = random_adapter(wide)
    method.begin_round(0, adapter, [0])
    assert method.download(0).numel() == method.exact_values(0) == whole, "the first time, the adapter"
    for index in range(12):
        adapter = round_of(method, index, adapter, [0, 1], lambda client, start: start + 1)
    method.begin_round(12, adapter, [0, 1, 2])
    assert method.download(0).numel() == 2 * per_rank, "the other's ranks, of the last round"
    assert method.exact_values(0) == 0, "they are passed on as they were sent"
    assert 12 * 4 * per_rank > dense
    assert method.download(2).numel() == dense + whole, "the dense residual, and the adapter beside it"
    assert method.exact_values(2) == dense + whole


@pytest.mark.parametrize(("name", "options", "says"), [
    ("fedprox", {"mu": "much"}, "mu='much': Input should be a valid number"),
    ("fedprox", {"mu": float("nan")}, "mu=nan: Input should be a finite number"),
    ("flexlora", {"client_ranks": 4}, "client_ranks=4: Input should be"),
    ("flexlora", {"client_ranks": []}, "give a rank or more"),
    ("krum", {"byzantine": 0.5}, "byzantine=0.5: Input should be a valid integer"),
])  # fmt: skip
def test_an_option_of_another_type_is_told(name, options, says):
    with pytest.raises(ValueError, match=says):
        make_methods(name, options)


def test_a_number_that_yaml_reads_as_text_is_a_number():
    assert make_methods("fedprox", {"mu": "1e-3"}).correction.mu == 1e-3
