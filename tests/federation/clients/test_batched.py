import pytest
import torch
from conftest import tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_devft.federation.clients.batched import (
    CannotStackError,
    ClientAxis,
    ClientLinear,
    clip_each,
    join_batches,
    stack_clients,
    stack_flat,
    unstack_flat,
)
from hf_devft.models import counted_logits
from hf_devft.models.counted_logits import count_logits
from hf_devft.models.layout import AdapterLayout


LAYOUT = AdapterLayout(("a.lora_A", "a.lora_B"), (torch.Size((2, 3)), torch.Size((4, 2))))


@given(clients=st.integers(1, 5), spare=st.integers(0, 2), seed=st.integers(0, 99))
def test_adapters_are_stacked_and_taken_apart(clients, spare, seed):
    vectors = torch.randn(clients, 14, generator=torch.Generator().manual_seed(seed))
    count = clients + spare
    flat = stack_flat(LAYOUT, list(vectors), count)
    first = flat[: count * 6].view(count, 2, 3)  # the first tensor of every client
    assert all(torch.equal(first[client], LAYOUT.cut(vectors[client])[0]) for client in range(clients))
    back = unstack_flat(LAYOUT, flat, count)
    assert torch.equal(back[:clients], vectors)
    assert not back[clients:].any()


@given(clients=st.integers(1, 4), max_norm=st.floats(0.01, 5), seed=st.integers(0, 99))
def test_each_client_is_clipped_by_its_own_norm(clients, max_norm, seed):
    torch.manual_seed(seed)
    shapes = [(2, 3), (4, 2)]
    stacked = [nn.Parameter(torch.zeros(clients, *shape)) for shape in shapes]
    for parameter in stacked:
        parameter.grad = torch.randn_like(parameter) * torch.arange(1, clients + 1).view(-1, 1, 1)
    alone = [[nn.Parameter(torch.zeros(shape)) for shape in shapes] for _ in range(clients)]
    norms = []
    for client, parameters in enumerate(alone):
        for parameter, together in zip(parameters, stacked, strict=True):
            parameter.grad = together.grad[client].clone()
        norms.append(nn.utils.clip_grad_norm_(parameters, max_norm))
    assert torch.allclose(clip_each(stacked, max_norm), torch.stack(norms))
    for client, parameters in enumerate(alone):
        for parameter, together in zip(parameters, stacked, strict=True):
            assert torch.allclose(parameter.grad, together.grad[client])


def test_every_client_has_a_linear_layer_of_its_own():
    axis = ClientAxis(torch.mean, clients=2, rows=6)
    layer = ClientLinear(nn.Linear(4, 5, bias=False), 3, axis)
    with torch.no_grad():
        layer.weight.normal_()
    x = torch.randn(6, 7, 4)
    expected = torch.cat([x[:3] @ layer.weight[0].T, x[3:] @ layer.weight[1].T])
    assert torch.allclose(layer(x), expected, atol=1e-6)
    for other in (torch.randn(5, 7, 4), torch.randn(6, 4)):
        with pytest.raises(CannotStackError, match="a batch of 6 rows"):
            layer(other)


def test_the_loss_is_the_sum_of_the_clients_own():
    def loss_function(logits, labels, num_items_in_batch=None):
        return (logits - labels).sum() / num_items_in_batch if num_items_in_batch else (logits - labels).mean()

    axis = ClientAxis(loss_function, clients=2, rows=4, items=[2, None])
    logits, labels = torch.tensor([1.0, 2.0, 3.0, 5.0]), torch.zeros(4)
    assert axis(logits, labels=labels, num_items_in_batch=None) == 1.5 + 4
    assert axis.losses.tolist() == [1.5, 4]


def batch(ids, labels, **more):
    ids = torch.tensor(ids)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(labels), **more}


def test_batches_are_joined_by_rows_and_tokens_that_do_not_count():
    long, wide = batch([[1, 2, 3]], [[-100, 2, 3]]), batch([[4, 5], [6, 7]], [[4, 5], [6, 7]])
    joined = join_batches([long, wide], {"input_ids": 9, "labels": -100})
    assert joined["input_ids"].tolist() == [[1, 2, 3], [1, 2, 3], [4, 5, 9], [6, 7, 9]]
    assert joined["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 0]]
    assert joined["labels"].tolist() == [[-100, 2, 3], [-100, -100, -100], [4, 5, -100], [6, 7, -100]]


@pytest.mark.parametrize(
    "other",
    [
        {"input_ids": torch.ones(1, 2), "attention_mask": torch.ones(1, 2)},
        batch([[1, 2]], [[1, 2], [3, 4]]),
        batch([[1, 2]], [0.5]),
        batch([[1, 2]], [[1, 2]], position_ids=torch.ones(1, 2)),
        batch([[1, 2]], [[1, 2]], attention_mask=[[1, 1]]),
    ],
)
def test_batches_of_other_forms_are_refused(other):
    with pytest.raises(CannotStackError, match="cannot be joined"):
        join_batches([other, other], {})


def test_a_loss_of_flattened_rows_is_refused():
    axis = ClientAxis(torch.mean, clients=2, rows=4, items=[None, None])
    with pytest.raises(CannotStackError, match="a batch of 4 rows"):
        axis(torch.ones(8))


@pytest.mark.parametrize("items", [[None, None], [torch.tensor(7), torch.tensor(3)]], ids=["mean", "num_items"])
def test_logits_where_labels_count_are_enough(items, monkeypatch):
    monkeypatch.setattr(counted_logits, "_PIECE", 2048 * 4)  # four tokens at a time
    ids = torch.randint(5, 2048, (4, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "labels": ids.clone(), "num_items_in_batch": items[0]}
    inputs["labels"][:, :4] = inputs["labels"][1] = -100

    def losses_and_gradients(counted):
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        model, axis = stack_clients(get_peft_model(tiny_llama(), config), 2)
        axis.clients, axis.rows, axis.items = 2, 4, items
        assert not counted or count_logits(model.get_base_model())
        output = model.train()(**inputs)
        assert (output.logits is None) == counted
        output.loss.backward()
        own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return own | {"loss": output.loss.detach(), "losses": axis.losses}

    torch.testing.assert_close(losses_and_gradients(True), losses_and_gradients(False), rtol=1e-4, atol=1e-6)
