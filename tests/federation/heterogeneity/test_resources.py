import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_devft.federation.heterogeneity.resources import ClientResources, load_resources, make_resources


DAY = 86_400.0


def test_work_takes_its_time():
    assert ClientResources(2e12, 1e6).seconds(4e12, 3e6) == 5
    assert ClientResources().seconds(1e12, 1e9) == 0


@given(seed=st.integers(0, 300), time=st.floats(0, 5 * DAY))
def test_times_hang_together(seed, time):
    for client in make_resources(5, seed):
        there = client.there_from(time)
        assert time <= there <= time + DAY
        assert client.is_there(there)
        leaves = client.stays_until(there)
        assert leaves > there
        if math.isfinite(leaves):
            assert not client.is_there(leaves + 1e-3)
            assert client.share_there(there, leaves) == pytest.approx(1)
            assert client.share_there(there, leaves + DAY) < 1


def test_times_over_the_days_end():
    client = ClientResources(available=((0.0, 100.0), (DAY - 50, DAY)))
    assert client.stays_until(DAY - 10) == DAY + 100
    assert client.there_from(200.0) == DAY - 50
    assert client.share_there(0.0, DAY) == pytest.approx(150 / DAY)
    assert ClientResources(available=((0.0, DAY),)).stays_until(5.0) == math.inf


def test_clients_from_a_file(tmp_path):
    path = tmp_path / "clients.json"
    path.write_text(json.dumps({"b": {"flops_per_second": 5.0, "available": [[10, 20]]}, "a": {}}))
    a, b = load_resources(path, ["a", "b"])
    assert a == ClientResources()
    assert b.there_from(0.0) == 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ('{"a": {}}', "lacks 1 clients, such as 'b'"),
        ('{"a": {}, "b": {"speed": 1}}', "speed.*Give flops_per_second, bytes_per_second"),
        ('{"a": {}, "b": {"flops_per_second": 0}}', "above 0"),
        ('{"a": {}, "b": {"available": [[5, 1]]}}', "within the period"),
        ('{"a": {}, "b": {"available": []}}', "within the period"),
    ],
)
def test_files_that_are_wrong(tmp_path, text, message):
    path = tmp_path / "clients.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_resources(path, ["a", "b"])
    with pytest.raises(ValueError, match="cannot be read"):
        load_resources(tmp_path / "none.json", ["a"])
