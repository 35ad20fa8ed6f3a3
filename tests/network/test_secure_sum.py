import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_devft.network.secure_sum import SecureSumError, SummingClient, from_fixed, to_fixed, unmask


def told_to(client, told):
    return {other: messages[client] for other, messages in told.items() if other != client}


def summed(values, threshold, missing=(), silent=()):
    """The sum over clients that do not fail, and what each has sent."""
    clients = {number: SummingClient(number) for number in range(len(values))}
    public = {number: client.public for number, client in clients.items()}
    told = {number: client.share(public, threshold) for number, client in clients.items()}
    sent = {
        number: client.mask(to_fixed(np.array(values[number]), 1.0), told_to(number, told))
        for number, client in clients.items()
    }
    arrived = [number for number in clients if number not in missing]
    revealed = [clients[number].reveal(arrived, missing) for number in arrived if number not in silent]
    total = sum((sent[number] for number in arrived), np.zeros(len(values[0]), np.uint32))
    return from_fixed(unmask(total, public, arrived, missing, revealed, threshold)), sent


@given(
    values=st.lists(st.lists(st.floats(-1, 1), min_size=3, max_size=3), min_size=2, max_size=5),
    data=st.data(),
)
def test_the_sum_is_that_of_the_clients_that_do_not_fail(values, data):
    count = len(values)
    threshold = count // 2 + 1
    missing = data.draw(st.sets(st.sampled_from(range(count)), max_size=count - threshold))
    total, _ = summed(values, threshold, missing)
    expected = sum(np.array(values[k]) for k in range(count) if k not in missing)
    np.testing.assert_allclose(total, expected, atol=count * 2**-28)


def test_what_is_sent_tells_nothing_alone():
    _, sent = summed([[0.0] * 2000] * 3, 2)
    for numbers in sent.values():
        assert abs(numbers.astype(float).mean() / 2**32 - 0.5) < 0.05
        assert len(np.unique(numbers)) > 1990


def test_too_few_shares_undo_nothing():
    with pytest.raises(SecureSumError, match="1 clients have revealed their shares, 2 are needed"):
        summed([[1.0], [2.0], [3.0]], 2, missing=[0], silent=[1])


def test_a_client_shows_no_part_of_itself():
    clients = {number: SummingClient(number) for number in range(3)}
    public = {number: client.public for number, client in clients.items()}
    with pytest.raises(SecureSumError, match="a threshold of 1 of 3"):
        clients[0].share(public, 1)
    told = {number: client.share(public, 2) for number, client in clients.items()}
    with pytest.raises(SecureSumError, match="1 clients take part, 2 are needed"):
        clients[0].mask(np.zeros(1, np.uint32), {})
    with pytest.raises(SecureSumError, match="cannot be read"):
        clients[0].mask(np.zeros(1, np.uint32), {1: told[2][0], 2: told[1][0]})
    clients[1].mask(np.zeros(1, np.uint32), told_to(1, told))
    for arrived, missing in (([1], [0, 2]), ([0, 1, 2], [2]), ([0, 2], [1]), ([0, 1], [])):
        with pytest.raises(SecureSumError, match="would show a client's own numbers"):
            clients[1].reveal(arrived, missing)
    clients[1].reveal([0, 1], [2])
    with pytest.raises(SecureSumError, match="would show"):
        clients[1].reveal([0, 1, 2], [])


def test_large_values_do_not_wrap():
    """Also where every client's is as large as can be; larger ones are refused, not cut."""
    total = sum((to_fixed(np.array([7.999, -7.999]), weight) for weight in (0.25, 0.75)), np.zeros(2, np.uint32))
    np.testing.assert_allclose(from_fixed(total), [7.999, -7.999], atol=1e-5)
    for value in (8.0, -12.0, float("nan")):
        with pytest.raises(SecureSumError, match="changed by 8 or more, which fixed-point numbers do not hold: lower"):
            to_fixed(np.array([0.0, value]), 0.5)
    for weight in (0.0, -1.0, 1.5):
        with pytest.raises(SecureSumError, match="must be above 0, up to 1"):
            to_fixed(np.zeros(1), weight)
