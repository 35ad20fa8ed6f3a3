"""A generator of instruction tasks with checkable answers: templated English, no files, no network.

Every family is one function from a random generator to a question and its answer. The embedded base was
pre-trained on the `SEEN` families and on a little of the `RARE` ones; of the `NEW` ones it has seen nothing,
so they are what the quickstart tunes.
"""

import random
import zlib
from collections.abc import Callable, Iterator

from datasets import Dataset


Family = Callable[[random.Random], tuple[str, str]]

SEEN: dict[str, Family] = {}
RARE: dict[str, Family] = {}
NEW: dict[str, Family] = {}

NAMES = "Anna Ben Clara David Emma Felix Grace Henry Iris Jack Kate Leo Mary Noah Olga Paul Rosa Sam".split()
CITIES = "Paris Rome Berlin London Madrid Vienna Oslo Athens Prague Dublin Lisbon Cairo Tokyo Delhi".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
CATEGORIES = {
    "animal": "cat dog horse cow sheep mouse lion tiger bear wolf fox duck".split(),
    "colour": "red blue green yellow black white brown pink grey purple".split(),
    "fruit": "apple pear plum cherry lemon orange banana melon grape peach".split(),
    "tool": "hammer saw drill knife spade brush axe ladder rope nail".split(),
    "drink": "water milk tea coffee juice wine beer cocoa".split(),
    "vehicle": "car bus train boat bike plane truck tram".split(),
}
WORDS = [word for words in CATEGORIES.values() for word in words]
ITEMS = "books stones coins cards pens cups eggs stamps boxes flowers".split()
ORDINALS = "first second third fourth fifth sixth".split()
UNITS = [
    ("minutes", "hours", 60),
    ("seconds", "minutes", 60),
    ("days", "weeks", 7),
    ("months", "years", 12),
    ("hours", "days", 24),
    ("centimetres", "metres", 100),
    ("millimetres", "centimetres", 10),
    ("metres", "kilometres", 1000),
    ("grams", "kilograms", 1000),
]


def _family(registry: dict[str, Family]) -> Callable[[Family], Family]:
    def register(function: Family) -> Family:
        registry[function.__name__] = function
        return function

    return register


def _words(rng: random.Random, low: int = 3, high: int = 6) -> list[str]:
    return rng.sample(WORDS, rng.randint(low, high))


def _with_repeats(rng: random.Random) -> tuple[str, list[str]]:
    """A word and a shuffled list of words in which it stands one to four times."""
    word, *others = rng.sample(WORDS, rng.randint(3, 5))
    words = others + [word] * rng.randint(1, 4)
    rng.shuffle(words)
    return word, words


def _numbers(rng: random.Random) -> list[int]:
    return rng.sample(range(1, 100), rng.randint(3, 5))


def _homes(rng: random.Random) -> tuple[str, str, str]:
    """A paragraph that says who lives where, and one person of it with their city."""
    count = rng.randint(3, 5)
    homes = list(zip(rng.sample(NAMES, count), rng.sample(CITIES, count), strict=True))
    paragraph = " ".join(f"{name} lives in {city}." for name, city in homes)
    return paragraph, *rng.choice(homes)


# --- families that the embedded base has seen ---------------------------------------------------


@_family(SEEN)
def addition(rng):
    name, item, a, b = rng.choice(NAMES), rng.choice(ITEMS), rng.randint(1, 49), rng.randint(1, 49)
    more = rng.choice(["gets {b} more", "buys {b} more", "finds another {b}"]).format(b=b)
    return f"{name} has {a} {item} and {more}. How many {item} does {name} have now?", str(a + b)


@_family(SEEN)
def copying(rng):
    words = " ".join(_words(rng))
    return rng.choice(["Repeat these words: {}", "Copy this line: {}"]).format(words), words


@_family(SEEN)
def reversing(rng):
    words = _words(rng)
    ask = rng.choice(["Write these words in reverse order: {}", "Reverse this list: {}"])
    return ask.format(" ".join(words)), " ".join(reversed(words))


@_family(SEEN)
def sorting(rng):
    numbers = _numbers(rng)
    ask = rng.choice(["Sort these numbers from small to large: {}", "Put these numbers in ascending order: {}"])
    return ask.format(" ".join(map(str, numbers))), " ".join(map(str, sorted(numbers)))


@_family(SEEN)
def counting(rng):
    word, words = _with_repeats(rng)
    return f"How many times does {word} appear in this list: {' '.join(words)}?", str(words.count(word))


@_family(SEEN)
def lookup(rng):
    paragraph, name, city = _homes(rng)
    return f"{paragraph} Where does {name} live?", city


@_family(SEEN)
def calendar(rng):
    day, days = rng.randrange(7), rng.randint(1, 30)
    ask = rng.choice(["What day comes {} days after {}?", "Which day of the week is it {} days after {}?"])
    return ask.format(days, DAYS[day]), DAYS[(day + days) % 7]


@_family(SEEN)
def clock(rng):
    minutes, later = 5 * rng.randrange(144), 5 * rng.randint(1, 11)
    end = (minutes + later) % 720
    return (
        f"It is {minutes // 60}:{minutes % 60:02}. What time is it in {later} minutes?",
        f"{end // 60}:{end % 60:02}",
    )


@_family(SEEN)
def conversion(rng):
    (small, large, factor), count = rng.choice(UNITS), rng.randint(2, 12)
    ask = rng.choice(["How many {0} are {2} {1}?", "Convert {2} {1} to {0}."])
    return ask.format(small, large, count), str(factor * count)


@_family(SEEN)
def largest(rng):
    numbers = _numbers(rng)
    return f"Which of these numbers is the largest: {' '.join(map(str, numbers))}?", str(max(numbers))


@_family(SEEN)
def replacing(rng):
    word, words = _with_repeats(rng)
    new = rng.choice([other for other in WORDS if other not in words])
    answer = " ".join(new if w == word else w for w in words)
    return f"Replace every {word} by {new}: {' '.join(words)}", answer


@_family(SEEN)
def sequence(rng):
    start, step = rng.randint(1, 30), rng.randint(1, 12)
    terms = [start + i * step for i in range(5)]
    return f"Which number comes next: {' '.join(map(str, terms[:-1]))}?", str(terms[-1])


@_family(SEEN)
def membership(rng):
    words = _words(rng)
    word = rng.choice(words) if rng.random() < 0.5 else rng.choice(WORDS)
    return f"Is {word} in this list: {' '.join(words)}?", "yes" if word in words else "no"


@_family(SEEN)
def category(rng):
    names = rng.sample(sorted(CATEGORIES), rng.randint(3, 5))
    words = [rng.choice(CATEGORIES[name]) for name in names]
    chosen = rng.randrange(len(names))
    return f"Which of these words is a kind of {names[chosen]}: {' '.join(words)}?", words[chosen]


@_family(SEEN)
def position(rng):
    words = _words(rng)
    index = rng.randrange(len(words))
    return f"What is the {ORDINALS[index]} word of this list: {' '.join(words)}?", words[index]


# --- families that it saw little of ----------------------------------------------------------------


@_family(RARE)
def subtraction(rng):
    name, item, a = rng.choice(NAMES), rng.choice(ITEMS), rng.randint(10, 98)
    b = rng.randint(1, a - 1)
    less = rng.choice(["gives away {b}", "loses {b}", "sells {b}"]).format(b=b)
    return f"{name} has {a} {item} and {less}. How many {item} are left?", str(a - b)


@_family(RARE)
def sorting_down(rng):
    numbers = _numbers(rng)
    ask = rng.choice(["Sort these numbers from large to small: {}", "Put these numbers in descending order: {}"])
    return ask.format(" ".join(map(str, numbers))), " ".join(map(str, sorted(numbers, reverse=True)))


@_family(RARE)
def reverse_lookup(rng):
    paragraph, name, city = _homes(rng)
    return f"{paragraph} Who lives in {city}?", name


@_family(RARE)
def calendar_back(rng):
    day, days = rng.randrange(7), rng.randint(1, 30)
    ask = rng.choice(["What day was it {} days before {}?", "Which day of the week is {} days before {}?"])
    return ask.format(days, DAYS[day]), DAYS[(day - days) % 7]


@_family(RARE)
def smallest(rng):
    numbers = _numbers(rng)
    return f"Which of these numbers is the smallest: {' '.join(map(str, numbers))}?", str(min(numbers))


@_family(RARE)
def removing(rng):
    word, words = _with_repeats(rng)
    return f"Leave out every {word}: {' '.join(words)}", " ".join(w for w in words if w != word)


@_family(RARE)
def doubling(rng):
    words = _words(rng, 2, 4)
    return f"Write every word twice: {' '.join(words)}", " ".join(w for word in words for w in (word, word))


@_family(RARE)
def swapping(rng):
    first, *middle, last = _words(rng)
    return f"Swap the first and the last word: {' '.join([first, *middle, last])}", " ".join([last, *middle, first])


# --- families that it has never seen ---------------------------------------------------------------


@_family(NEW)
def rotating(rng):
    first, *others = _words(rng)
    return f"Move the first word to the end: {' '.join([first, *others])}", " ".join([*others, first])


@_family(NEW)
def dropping(rng):
    words = _words(rng)
    return f"Write all but the last word: {' '.join(words)}", " ".join(words[:-1])


@_family(NEW)
def ends(rng):
    words = _words(rng)
    return f"Write the last word and then the first: {' '.join(words)}", f"{words[-1]} {words[0]}"


@_family(NEW)
def closing(rng):
    words = _words(rng)
    return f"Write the list and its first word again: {' '.join(words)}", " ".join([*words, words[0]])


@_family(NEW)
def mirroring(rng):
    words = _words(rng, 2, 4)
    return f"Write the list forwards and then backwards: {' '.join(words)}", " ".join(words + words[::-1])


@_family(NEW)
def alternating(rng):
    words = _words(rng, 4, 6)
    return f"Write every second word: {' '.join(words)}", " ".join(words[1::2])


@_family(NEW)
def stranger(rng):
    name, other = rng.sample(sorted(CATEGORIES), 2)
    stranger = rng.choice(CATEGORIES[other])
    words = rng.sample(CATEGORIES[name], rng.randint(2, 4)) + [stranger]
    rng.shuffle(words)
    return f"Which of these words is not like the others: {' '.join(words)}?", stranger


@_family(NEW)
def successor(rng):
    numbers = _numbers(rng)
    ask = f"Add one to each of these numbers: {' '.join(map(str, numbers))}"
    return ask, " ".join(str(number + 1) for number in numbers)


FAMILIES = SEEN | RARE | NEW
SPLITS = ("train", "test")


def split_of(prompt: str) -> str:
    """Which split a prompt belongs to: one prompt in eight is test, whatever the seed (our choice)."""
    return "test" if zlib.crc32(prompt.encode()) % 8 == 0 else "train"


def generate(families: dict[str, float], split: str = "train", seed: int = 0) -> Iterator[dict[str, str]]:
    """Endless rows `prompt`, `completion`, `family`, drawn with the given weights.

    Args:
        families: {name: weight}, names out of `FAMILIES`.
        split: "train" or "test"; no prompt is in both, for any two seeds.
        seed: the same seed gives the same rows.

    Raises:
        ValueError: an unknown family or split.
    """
    if unknown := sorted(set(families) - set(FAMILIES)):
        raise ValueError(f"unknown task families {unknown}; choose from {sorted(FAMILIES)}")
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: choose from {SPLITS}")
    rng = random.Random(seed)
    names, weights = list(families), list(families.values())
    while True:
        name = rng.choices(names, weights)[0]
        question, answer = FAMILIES[name](rng)
        prompt = f"{question}\nAnswer:"
        if split_of(prompt) == split:
            yield {"prompt": prompt, "completion": f" {answer}", "family": name}


def task_dataset(rows: int, families: list[str] | None = None, split: str = "train", seed: int = 0) -> Dataset:
    """`rows` distinct rows of the given families (default: the new ones), equally weighted."""
    weights = dict.fromkeys(NEW if families is None else families, 1.0)
    distinct: dict[str, dict[str, str]] = {}
    for drawn, row in enumerate(generate(weights, split, seed)):
        distinct.setdefault(row["prompt"], row)
        if len(distinct) == rows:
            break
        if drawn > 50 * rows:
            raise ValueError(f"{sorted(weights)} have only {len(distinct)} distinct {split} rows, not rows={rows}")
    return Dataset.from_list(list(distinct.values()))


def preference_pairs(tasks: Dataset) -> Dataset:
    """Rows of `prompt`, `chosen` and `rejected`, for preference optimisation: each task's own answer, and that of the
    next task of its family that has another."""
    answers: dict[str, list[str]] = {}
    for row in tasks:
        answers.setdefault(row["family"], []).append(row["completion"])
    seen: dict[str, int] = {}
    pairs = []
    for row in tasks:
        family, own = answers[row["family"]], row["completion"]
        place = seen[row["family"]] = seen.get(row["family"], -1) + 1
        others = [*family[place + 1 :], *family[:place]]
        rejected = next((answer for answer in others if answer != own), own + own)
        pairs.append({"prompt": row["prompt"], "chosen": own, "rejected": rejected, "family": row["family"]})
    return Dataset.from_list(pairs)
