"""Corrections of local training and server optimisers, and how names are joined."""

import pytest
import torch
from rounds_of import begin, layout, random_adapter, round_of

from hf_devft.federation.memory import SERVER
from hf_devft.federation.methods import CORRECTIONS, METHODS, SERVER_OPTIMIZERS, make_methods
from hf_devft.federation.methods.fedit import FedIT


def test_fedprox_is_the_gradient_of_the_proximal_term():
    start, adapter = random_adapter(layout()), random_adapter(layout(), 1).requires_grad_()
    (0.3 / 2 * (adapter - start).square().sum()).backward()
    gradient = CORRECTIONS["fedprox"](mu=0.3).gradient(0, start, adapter.detach())
    torch.testing.assert_close(gradient, adapter.grad)


def scaffold_round(scaffold, adapter, gradients):
    """A round of clients with these mean gradients; returns what was added to each client's."""
    scaffold.begin_round(adapter)
    scaffold.arrive(scaffold.download())
    added = {}
    for client, gradient in gradients.items():
        added[client] = scaffold.gradient(client, adapter, adapter)
        scaffold.receive(client, scaffold.payload(client, gradient))
        scaffold.keep(client, gradient)
    scaffold.end_round()
    scaffold.memory.commit()
    return added


def test_scaffolds_variates():
    of, adapter = layout(), random_adapter(layout())
    method, scaffold = FedIT(), CORRECTIONS["scaffold"]()
    clients = begin(method, of, [1, 2, 3, 4], adapter)
    scaffold.begin_run(clients)
    scaffold.begin_stage(of)
    gradients = {client: random_adapter(of, client + 10) for client in range(4)}
    first = scaffold_round(scaffold, adapter, {0: gradients[0], 2: gradients[2]})
    assert not any(value.any() for value in first.values()), "all variates start at zero"
    second = scaffold_round(scaffold, adapter, {2: gradients[3], 1: gradients[1]})
    control = 0.1 * gradients[0] + 0.3 * gradients[2]  # c = Σ p_k c_k, those of clients that never trained being zero
    torch.testing.assert_close(second[2], control - gradients[2])
    torch.testing.assert_close(second[1], control)
    own = [scaffold.memory.get(client, "control") for client in range(4)]
    total = sum(0.1 * (client + 1) * of.flat(state) for client, state in enumerate(own) if state is not None)
    torch.testing.assert_close(of.flat(scaffold.memory.get(SERVER, "control")), total)


def test_clients_that_have_not_said_how_many_rows_they_have_count_as_the_others_do():
    scaffold, of = CORRECTIONS["scaffold"](), layout(modules=1)
    method = FedIT()
    scaffold.begin_run(begin(method, of, [2, 4, 0, 0], random_adapter(of)))
    scaffold.begin_stage(of)
    gradient = random_adapter(of, 1)
    scaffold_round(scaffold, random_adapter(of), {1: gradient})
    torch.testing.assert_close(of.flat(scaffold.memory.get(SERVER, "control")), gradient * 4 / 12)


def test_scaffold_ends_at_the_optimum_of_all_rows_where_averaging_alone_drifts_away():
    """Clients of 9 rows and of 1, f_k(x) = ½ s_k (x − a_k)², many local steps of gradient descent."""
    of, examples, slopes, targets = layout(modules=1), [9, 1], [1.0, 6.0], [0.0, 1.0]
    optimum = 1 * 6.0 / (9 * 1.0 + 1 * 6.0)
    ends = {}
    for name in ("scaffold", None):
        method, correction = FedIT(), CORRECTIONS[name]() if name else None
        adapter = torch.full((sum(of.sizes),), 0.5)
        clients = begin(method, of, examples, adapter)
        if correction is not None:
            correction.begin_run(clients)
            correction.begin_stage(of)
        for index in range(60):
            if correction is not None:
                correction.begin_round(adapter)
                correction.arrive(correction.download())
            gradients = {}

            def train(client, start, correction=correction, gradients=gradients):
                now, raw = start.clone(), []
                for _ in range(10):
                    raw.append(slopes[client] * (now - targets[client]))
                    extra = 0 if correction is None else correction.gradient(client, start, now)
                    now = now - 0.05 * (raw[-1] + extra)
                gradients[client] = sum(raw) / len(raw)
                return now

            adapter = round_of(method, index, adapter, [0, 1], train)
            if correction is not None:
                for client, gradient in gradients.items():
                    correction.receive(client, correction.payload(client, gradient))
                    correction.keep(client, gradient)
                correction.end_round()
                correction.memory.commit()
        ends[name] = adapter[0].item()
    assert ends["scaffold"] == pytest.approx(optimum, abs=1e-3)
    assert abs(ends[None] - optimum) > 0.05


def by_hand(name, gradients, rate=0.1, beta1=0.9, beta2=0.99, tau=1e-3):
    """Where a scalar goes along these pseudo-gradients, by the papers' formulas."""
    x, m, v = 0.0, 0.0, tau**2
    for step, g in enumerate(gradients, start=1):
        if name == "fedavgm":
            m = beta1 * m + g
            x -= rate * m
        elif name == "fedadagrad":
            v += g * g
            x -= rate * g / (v**0.5 + tau)
        elif name == "fedyogi":
            m = beta1 * m + (1 - beta1) * g
            v -= (1 - beta2) * g * g * ((v > g * g) - (v < g * g))
            x -= rate * m / (v**0.5 + tau)
        else:
            m, v = beta1 * m + (1 - beta1) * g, beta2 * (0.0 if step == 1 else v) + (1 - beta2) * g * g
            x -= rate * (m / (1 - beta1**step)) / ((v / (1 - beta2**step)) ** 0.5 + tau)
    return x


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_server_optimisers_step_along_the_update(name):
    """Tensors that were not sent in a round do not know of it: neither steps nor momenta."""
    optimizer, of = SERVER_OPTIMIZERS[name](server_learning_rate=0.1), layout(modules=1)
    adapter = torch.zeros(sum(of.sizes))
    optimizer.begin_stage(of, adapter)
    sent = [[0.5, 0.3], [-0.2, None], [0.1, -0.4]]
    for gradients in sent:
        aggregate = adapter.clone()
        for place, gradient in enumerate(gradients):
            if gradient is not None:
                of.put(aggregate, [place], of.pick(aggregate, [place]) - gradient)
        updated = [place for place, gradient in enumerate(gradients) if gradient is not None]
        adapter = optimizer.step(adapter, aggregate, updated)
    for place, part in enumerate(of.cut(adapter)):
        own = [gradients[place] for gradients in sent if gradients[place] is not None]
        torch.testing.assert_close(part, torch.full_like(part, by_hand(name, own)))


def test_what_was_not_sent_is_the_aggregates():
    optimizer, of = SERVER_OPTIMIZERS["fedadam"](), layout(modules=1)
    start, aggregate = random_adapter(of), random_adapter(of, 1)
    optimizer.begin_stage(of, start)
    stepped = optimizer.step(start, aggregate, [1])
    assert torch.equal(of.cut(stepped)[0], of.cut(aggregate)[0])
    assert not torch.equal(of.cut(stepped)[1], of.cut(aggregate)[1])


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_a_server_optimiser_goes_on_from_its_state(name):
    whole, resumed = (SERVER_OPTIMIZERS[name]() for _ in range(2))
    of, adapter = layout(), random_adapter(layout())
    whole.begin_stage(of, adapter)
    first = whole.step(adapter, adapter - random_adapter(of, 1), of.all)
    resumed.begin_stage(of, first)
    resumed.load_state_dict({key: value.clone() for key, value in whole.state_dict().items()})
    second = first - random_adapter(of, 2)
    assert torch.equal(resumed.step(first, second, of.all), whole.step(first, second, of.all))
    whole.end_stage()
    assert whole.state_dict() == {}


def test_plain_averaging_is_fedavgm_without_momentum():
    optimizer = SERVER_OPTIMIZERS["fedavgm"](server_momentum=0.0)
    start, aggregate = random_adapter(layout()), random_adapter(layout(), 1)
    optimizer.begin_stage(layout(), start)
    torch.testing.assert_close(optimizer.step(start, aggregate, layout().all), aggregate)


def test_names_are_joined():
    method, correction, optimizer, _ = make_methods(
        "ffa_lora+fedprox+fedadam", {"mu": 0.5, "server_learning_rate": 0.2}
    )
    assert isinstance(method, METHODS["ffa_lora"])
    assert correction.mu == 0.5
    assert optimizer.rate == 0.2
    method, correction, optimizer, _ = make_methods("fedyogi")
    assert type(method) is FedIT
    assert correction is None


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fedavg", {}, "'fedavg' is unknown.*fedit, ffa_lora.*fedprox.*fedadam"),
        ("fedit+flora", {}, "names two methods"),
        ("fedadam+fedyogi", {}, "names two server optimisers"),
        ("fedprox", {"nu": 1}, r"\['nu'\].*takes \['mu'\]"),
        ("fedit", {"mu": 1}, "takes none"),
        ("fedprox", {"mu": -1}, "0 or more"),
        ("fedadam", {"server_learning_rate": 0}, "above 0"),
        ("fedavgm", {"server_beta2": 0.9}, r"takes \['server_learning_rate', 'server_momentum'\]"),
        ("fedadagrad", {"server_momentum": 0.5}, r"takes \['server_learning_rate', 'server_tau'\]"),
    ],
)
def test_names_and_options_that_make_no_sense(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_methods(name, options)


def test_a_name_of_ones_own_must_not_stand_for_two_things(monkeypatch):
    monkeypatch.setitem(METHODS, "median", METHODS["fedit"])
    with pytest.raises(ValueError, match=r"'median' is registered as method and as aggregation rule.*another name"):
        make_methods("fedit+median")
