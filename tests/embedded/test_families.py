import itertools
import re

import pytest

from hf_devft.embedded.families import FAMILIES, NEW, RARE, SEEN, generate, split_of, task_dataset


def test_there_are_at_least_twelve_families():
    assert len(FAMILIES) == len(SEEN) + len(RARE) + len(NEW) >= 12


def test_same_seed_same_rows():
    assert task_dataset(50, seed=3)[:] == task_dataset(50, seed=3)[:]
    assert task_dataset(50, seed=3)[:] != task_dataset(50, seed=4)[:]


def test_splits_share_no_prompt():
    train, test = task_dataset(500, seed=0), task_dataset(200, split="test", seed=1)
    assert not set(train["prompt"]) & set(test["prompt"])
    assert {split_of(prompt) for prompt in test["prompt"]} == {"test"}


def test_rows_are_distinct_and_of_all_new_families():
    rows = task_dataset(400)
    assert len(set(rows["prompt"])) == 400
    assert set(rows["family"]) == set(NEW)


# A second way to each answer, from the prompt alone.
def _numbers(prompt):
    return [int(number) for number in re.findall(r"\d+", prompt)]


def _list(prompt):
    return prompt.removesuffix("\nAnswer:").rstrip("?").split(": ")[1].split()


def _convert(prompt):
    factors = {
        "minutes hours": 60, "seconds minutes": 60, "days weeks": 7, "months years": 12, "hours days": 24,
        "centimetres metres": 100, "millimetres centimetres": 10, "metres kilometres": 1000, "grams kilograms": 1000,
    }  # fmt: skip
    words = re.findall(r"[a-z]+", prompt)
    units = [word for word in words if any(word in pair.split() for pair in factors)]
    pair = f"{units[0]} {units[1]}" if f"{units[0]} {units[1]}" in factors else f"{units[1]} {units[0]}"
    return str(_numbers(prompt)[0] * factors[pair])


DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def _day(prompt, sign):
    start = next(index for index, day in enumerate(DAYS) if f" {day}?" in prompt)
    return DAYS[(start + sign * _numbers(prompt)[0]) % 7]


CHECKS = {
    "addition": lambda p: str(sum(_numbers(p))),
    "subtraction": lambda p: str(_numbers(p)[0] - _numbers(p)[1]),
    "copying": lambda p: " ".join(_list(p)),
    "reversing": lambda p: " ".join(_list(p)[::-1]),
    "sorting": lambda p: " ".join(sorted(_list(p), key=int)),
    "sorting_down": lambda p: " ".join(sorted(_list(p), key=int)[::-1]),
    "largest": lambda p: max(_list(p), key=int),
    "smallest": lambda p: min(_list(p), key=int),
    "counting": lambda p: str(_list(p).count(p.split()[4])),
    "lookup": lambda p: re.search(rf"{p.split()[-3]} lives in (\w+)\.", p)[1],
    "reverse_lookup": lambda p: re.search(rf"(\w+) lives in {p.split()[-2][:-1]}\.", p)[1],
    "calendar": lambda p: _day(p, 1),
    "calendar_back": lambda p: _day(p, -1),
    "conversion": _convert,
    "rotating": lambda p: " ".join(_list(p)[1:] + _list(p)[:1]),
    "dropping": lambda p: " ".join(_list(p)[:-1]),
    "ends": lambda p: f"{_list(p)[-1]} {_list(p)[0]}",
    "closing": lambda p: " ".join(_list(p) + _list(p)[:1]),
    "mirroring": lambda p: " ".join(_list(p) + _list(p)[::-1]),
    "alternating": lambda p: " ".join(_list(p)[1::2]),
    "successor": lambda p: " ".join(str(int(number) + 1) for number in _list(p)),
    "doubling": lambda p: " ".join(f"{word} {word}" for word in _list(p)),
}


@pytest.mark.parametrize("family", CHECKS)
def test_answers_are_right(family):
    for row in itertools.islice(generate({family: 1.0}), 100):
        assert row["completion"] == f" {CHECKS[family](row['prompt'])}", row


def test_bad_requests():
    with pytest.raises(ValueError, match="unknown task families"):
        task_dataset(1, ["cooking"])
    with pytest.raises(ValueError, match="split"):
        task_dataset(1, split="dev")
    with pytest.raises(ValueError, match="distinct"):
        task_dataset(10_000, ["conversion"])
