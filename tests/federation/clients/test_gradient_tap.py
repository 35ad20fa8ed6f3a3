import torch
from torch import nn

from hf_devft.federation.clients.gradient_tap import GradientTap
from hf_devft.models.layout import AdapterLayout


def tap(parameters, correction=None, records=False, scale=1.0):
    layout = AdapterLayout(tuple("ab"), tuple(p.shape for p in parameters))
    read = lambda: torch.cat([p.detach().flatten() for p in parameters])  # noqa: E731
    return GradientTap(parameters, layout, read, correction, records, lambda: scale)


def backward(parameters, factor=1.0):
    (factor * sum((p**2).sum() for p in parameters)).backward()


def test_the_correction_is_added_in_the_last_piece_only():
    parameters = [nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([[3.0]]))]
    with tap(parameters, correction=lambda adapter: 10 * adapter) as tapped:
        tapped.begin_step()
        backward(parameters)
        tapped.corrects = True
        backward(parameters)
    assert parameters[0].grad.tolist() == [2 + 2 + 10, 4 + 4 + 20]
    assert parameters[1].grad.tolist() == [[6 + 6 + 30]]
    backward(parameters)
    assert parameters[1].grad.tolist() == [[48]], "nothing is added any more"


def test_gradients_are_recorded_as_they_are_before():
    parameters = [nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([[3.0]]))]
    with tap(parameters, correction=lambda adapter: 10 * adapter, records=True, scale=4.0) as tapped:
        for _ in range(2):  # two steps of one piece each, of a loss scaled by 4
            tapped.begin_step()
            tapped.corrects = True
            backward(parameters, factor=4.0)
    assert tapped.mean_gradient().tolist() == [2, 4, 6]
    assert parameters[0].grad.tolist() == [2 * 4 * (2 + 10), 2 * 4 * (4 + 20)]


def test_what_is_not_trained_is_left_alone():
    parameters = [nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([3.0]), requires_grad=False)]
    with tap(parameters, correction=lambda adapter: adapter, records=True) as tapped:
        tapped.begin_step()
        tapped.corrects = True
        backward(parameters[:1])
    assert tapped.mean_gradient().tolist() == [2, 0]
    assert parameters[1].grad is None


def test_a_step_without_a_gradient_counts():
    """A process without rows of a batch has such a one, and the mean is that of all processes' steps."""
    parameters = [nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([[3.0]]))]
    with tap(parameters, records=True) as tapped:
        for factor in (1.0, 0.0, 1.0, 0.0):
            tapped.begin_step()
            backward(parameters, factor)
    assert tapped.mean_gradient().tolist() == [1, 2, 3]


def test_a_step_that_overflows_is_left_out():
    parameters = [nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([[3.0]]))]
    with tap(parameters, records=True) as tapped:
        for factor in (1.0, float("inf"), 3.0):
            tapped.begin_step()
            backward(parameters, factor)
    assert tapped.mean_gradient().tolist() == [4, 8, 12]
