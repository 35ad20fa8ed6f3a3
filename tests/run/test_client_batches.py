import numpy as np
import pytest
from conftest import config
from datasets import Dataset

from hf_devft.federation.partition import partition_dataset
from hf_devft.run.client_batches import lengths_of
from hf_devft.run.plan import planned_batches
from hf_devft.tasks.data import tokenize


def test_lengths_are_of_the_tokens_or_of_a_column():
    rows = Dataset.from_dict({"input_ids": [[1, 2], [], [3]], "length": [9, 8, 7]}).select([2, 0])
    assert lengths_of(rows).tolist() == [7, 9]
    assert lengths_of(rows, "size").tolist() == [1, 2]
    with pytest.raises(ValueError, match=r"needs a column 'length' or \"input_ids\"; there are \['image'\]"):
        lengths_of(Dataset.from_dict({"image": [1]}))


def test_rows_of_like_length_need_less_padding(tasks, tokenizer, tmp_path):
    clients = partition_dataset(tokenize(tasks, tokenizer, 64), "iid", 3, seed=0)
    padded = {}
    for strategy in ("random", "group_by_length"):
        args = config(tmp_path, train_sampling_strategy=strategy, local_steps=4, per_device_train_batch_size=4)
        padded[strategy] = sum(np.prod(batch) for batch in planned_batches(args, clients, False, range(6)))
    assert padded["group_by_length"] < 0.9 * padded["random"]
