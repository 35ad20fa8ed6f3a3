import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_devft.federation.partition import from_mapping, hold_out, make_clients, partition_dataset


@given(
    rows=st.integers(1, 80), values=st.integers(1, 5), count=st.integers(1, 30), alpha=st.floats(0.01, 100),
    kind=st.sampled_from(["iid", "dirichlet", "natural"]), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_every_row_has_one_client_and_every_client_a_row(rows, values, count, alpha, kind, seed):
    dataset = Dataset.from_dict({"label": [str(i % values) for i in range(rows)]})
    count = None if kind == "natural" else min(count, rows)
    clients = partition_dataset(dataset, kind, count, "label", alpha, seed)
    assert len(clients.rows) == (min(values, rows) if count is None else count)
    assert all(len(part) for part in clients.rows.values())
    assert sorted(np.concatenate(list(clients.rows.values()))) == list(range(rows))
    again = partition_dataset(dataset, kind, count, "label", alpha, seed)
    assert all(np.array_equal(part, again.rows[name]) for name, part in clients.rows.items())


def test_values_of_few_rows_are_not_all_the_last_clients():
    """However the shares are rounded."""
    dataset = Dataset.from_dict({"topic": [str(row // 2) for row in range(200)]})
    sizes = np.array([
        [len(rows) for rows in partition_dataset(dataset, "dirichlet", 20, "topic", 100.0, seed).rows.values()]
        for seed in range(20)
    ]).mean(0)  # fmt: skip
    assert sizes.sum() == 200
    assert 5 < sizes.min() < 10 < sizes.max() < 15


def test_a_small_alpha_makes_clients_differ():
    dataset = Dataset.from_dict({"label": ["a", "b"] * 500})

    def spread(alpha):
        clients = partition_dataset(dataset, "dirichlet", 10, "label", alpha)
        labels = np.array(dataset["label"])
        return np.std([np.mean(labels[part] == "a") for part in clients.rows.values()])

    assert spread(0.05) > 3 * spread(100)


def test_natural_clients_are_named_by_their_value():
    dataset = Dataset.from_dict({"source": ["x", "y", "x"]})
    clients = partition_dataset(dataset, "natural", column="source")
    assert {name: part.tolist() for name, part in clients.rows.items()} == {"x": [0, 2], "y": [1]}
    with pytest.raises(ValueError, match="has 2 values"):
        partition_dataset(dataset, "natural", 3, "source")


def test_given_clients_keep_their_rows():
    a, b = Dataset.from_dict({"n": [1, 2]}), Dataset.from_dict({"n": [3]})
    clients = from_mapping({"a": a, "b": b})
    assert {name: clients.dataset.select(part)["n"][:] for name, part in clients.rows.items()} == {
        "a": [1, 2],
        "b": [3],
    }


def test_splits_are_not_clients():
    rows = Dataset.from_dict({"n": [1, 2]})
    for splits in (DatasetDict(train=rows, test=rows), {"train": rows}):
        with pytest.raises(ValueError, match=r"the splits train.*: pass one of them"):
            make_clients(splits)
    assert list(make_clients({"train": rows, "clinic": rows}).rows) == ["train", "clinic"]


def test_clients_say_how_their_rows_came_to_them():
    rows = Dataset.from_dict({"input_ids": [[number] for number in range(8)]})
    own = make_clients({"a": rows.select(range(4)), "b": rows.select(range(4, 8))})
    assert own.partition == "each client's own data"
    assert hold_out(own, 0.25)[0].partition == own.partition
    assert hold_out(make_clients(rows, num_clients=2), 0.25)[0].partition == "iid"


@pytest.mark.parametrize("values", [["a", None, "b"], [1.0, float("nan"), 2.0]], ids=["none", "nan"])
@pytest.mark.parametrize("kind", ["dirichlet", "natural"])
def test_a_row_that_would_be_nobodys_is_told(kind, values):
    with pytest.raises(ValueError, match="partition_column='owner': row 1 has no value there"):
        partition_dataset(Dataset.from_dict({"owner": values}), kind, column="owner")


def test_a_partitioner_stands_alone():
    rows = Dataset.from_dict({"n": [1, 2]})

    class Partitioner:
        num_partitions = 2

    with pytest.raises(ValueError, match="says whose rows are whose: leave `partitioner` out"):
        make_clients({"a": rows}, Partitioner())
