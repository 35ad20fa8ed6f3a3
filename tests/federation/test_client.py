import torch
from conftest import lora, tiny_llama
from peft import get_peft_model

from hf_devft.federation.client import AdapterBuffer


def test_the_buffer_is_the_parameters():
    model = get_peft_model(tiny_llama(2), lora())
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in parameters]
    buffer = AdapterBuffer(model)
    assert buffer.flat.numel() == sum(parameter.numel() for parameter in parameters)
    assert all(torch.equal(parameter, old) for parameter, old in zip(parameters, before, strict=True))
    buffer.flat.zero_()
    assert all(not parameter.any() for parameter in parameters)


def test_an_optimiser_step_is_seen_in_the_buffer():
    model = get_peft_model(tiny_llama(2), lora())
    buffer = AdapterBuffer(model)
    start = buffer.flat.clone()
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1.0)
    ids = torch.tensor([[1, 2, 3]])
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert not torch.equal(buffer.flat, start)
