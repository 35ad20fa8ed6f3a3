import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rounds_of import layout, random_adapter

from hf_devft.federation.encoding import BITS, BLOCK, encode, from_bytes, to_bytes
from hf_devft.federation.memory import Memory
from hf_devft.federation.wire import Wire


def make(dtype="fp32", top_k=1.0) -> Wire:
    wire = Wire(dtype, top_k, Memory())
    wire.begin_stage(layout())
    return wire


@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=3 * BLOCK),
    dtype=st.sampled_from(["int4", "int8"]),
)
def test_quantised_values_are_within_half_a_level(values, dtype):
    values = torch.tensor(values)
    got = encode(values, dtype).decoded
    assert got.shape == values.shape
    for part, result in zip(values.split(BLOCK), got.split(BLOCK), strict=True):
        level = part.abs().max() / (2 ** (BITS[dtype][0] - 1) - 1)
        assert (part - result).abs().max() <= 0.51 * level + 1e-30
    torch.testing.assert_close(encode(got, dtype).decoded, got, rtol=0.02, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "top_k", "down", "up"),
    [
        ("fp32", 1.0, 400, 400),
        ("bf16", 1.0, 200, 200),
        ("int8", 1.0, 100 + 4, 100 + 4),
        ("int4", 1.0, 50 + 4, 50 + 4),
        ("fp32", 0.1, 400, 10 * 4 + 10 * 4),
        ("int4", 0.25, 54, 13 + 2 + 25 * 4),
    ],
)
def test_bytes(dtype, top_k, down, up):
    wire = make(dtype, top_k)
    assert (wire.bytes_down(100), wire.bytes_up(100)) == (down, up)
    assert wire.bytes_down(0) == wire.bytes_up(0) == 0


def test_single_precision_is_not_touched():
    wire, vector = make(), random_adapter(layout())
    assert wire.down(vector).decoded is vector
    assert wire.up(0, vector, torch.zeros_like(vector)).arrive(torch.zeros_like(vector)) is vector
    assert wire.memory.state_dict() == {}


@pytest.mark.parametrize(
    ("dtype", "top_k"), [("bf16", 1.0), ("int8", 1.0), ("int4", 1.0), ("fp32", 0.1), ("int4", 0.2)]
)
def test_what_is_left_out_is_sent_later(dtype, top_k):
    """A client whose change is the same again and again: on average the server gets it, however coarse the wire."""
    wire = make(dtype, top_k)
    change = random_adapter(layout())
    known = random_adapter(layout(), 1)
    total, count = torch.zeros_like(change), 60
    for _ in range(count):
        total += wire.up(3, known + change, known).decoded
        wire.memory.commit()
    left_out = layout().flat(wire.memory.get(3, "left-out-adapter"))
    torch.testing.assert_close(total + left_out, count * change, rtol=1e-3, atol=1e-3)
    assert (total / count - change).abs().max() < 0.25
    assert wire.memory.get(4, "left-out-adapter") is None


def test_errors_belong_to_their_values():
    """Messages of other parts of the adapter: each part gets back what it has left out."""
    wire, of = make("int4"), layout()
    change = random_adapter(of)
    halves = [of.all[:2], of.all[2:]]
    for places in halves:
        wire.up(0, change, torch.zeros_like(change), lambda vector, places=places: of.pick(vector, places))
        wire.memory.commit()
    errors = of.flat(wire.memory.get(0, "left-out-adapter"))
    alone = make("int4")
    alone.up(0, change, torch.zeros_like(change), lambda vector: of.pick(vector, halves[1]))
    alone.memory.commit()
    expected = of.flat(alone.memory.get(0, "left-out-adapter"))
    assert torch.equal(of.pick(errors, halves[1]), of.pick(expected, halves[1]))
    assert of.pick(errors, halves[0]).any()


def test_where_values_change_their_meaning_nothing_is_fed_back():
    wire, change = make("int4"), random_adapter(layout())
    wire.up(0, change, torch.zeros_like(change), error_feedback=False)
    wire.memory.commit()
    assert wire.memory.state_dict() == {}


def test_the_largest_changes_are_sent():
    wire = make(top_k=0.02)
    change = torch.zeros(sum(layout().sizes))
    change[[3, 50]] = torch.tensor([5.0, -7.0])
    change[9] = 1.0
    known = random_adapter(layout())
    got = wire.up(0, known + change, known).decoded
    assert torch.nonzero(got).flatten().tolist() == [3, 50]


@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=3 * BLOCK),
    dtype=st.sampled_from(list(BITS)),
    fraction=st.sampled_from([1.0, 0.3]),
)
def test_messages_are_as_many_bytes_as_are_counted_and_are_read_as_they_were(values, dtype, fraction):
    wire, count = Wire(dtype, fraction, Memory()), len(values)
    values = torch.tensor(values)
    known = torch.ones_like(values)
    down, up = wire.down(values), wire.up(0, values, known, error_feedback=False)
    sent_down, sent_up = to_bytes(down, dtype), to_bytes(up, dtype)
    assert (len(sent_down), len(sent_up)) == (wire.bytes_down(count), wire.bytes_up(count))
    assert torch.equal(wire.parse_down(sent_down, count).decoded, down.decoded)
    assert torch.equal(wire.parse_up(sent_up, count).arrive(known), up.arrive(known))


def test_bytes_of_another_message_are_refused():
    with pytest.raises(ValueError, match="has 400 bytes, this one has 396"):
        make().parse_up(bytes(396), 100)
    good = to_bytes(encode(torch.ones(300), "fp32", torch.tensor([3, 200])), "fp32")
    assert from_bytes(good, "fp32", 300, chosen=2).decoded.sum() == 2
    with pytest.raises(ValueError, match="ascending places below 100"):
        from_bytes(good, "fp32", 100, chosen=2)
