"""What bad clients of a simulation do: to their rows, or to what they send."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from hf_devft.federation.client_side import Answer, ClientSide, Exchange, FromClient, ToClient
from hf_devft.federation.encoding import Encoded
from hf_devft.tasks.data import IGNORED
from hf_devft.trainer.local_clients import LocalClients


# (own honest update, the honest updates of all clients of the round) -> what is sent.
Lie = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# A batch -> another one.
Poison = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]

TRIGGER, TARGET = 1900, 1901  # two tokens of the embedded tokenizer's 2,048 that the tasks do not have


def scaled(own: torch.Tensor, everyone: torch.Tensor) -> torch.Tensor:
    """A million times the update."""
    return 1e6 * own


def sign_flip(own: torch.Tensor, everyone: torch.Tensor) -> torch.Tensor:
    """Ten times the update, backwards."""
    return -10 * own


def gaussian(own: torch.Tensor, everyone: torch.Tensor) -> torch.Tensor:
    """Noise of ten times the update's norm."""
    noise = torch.randn(own.shape, generator=torch.Generator().manual_seed(0))
    return (10 * own.norm() / noise.norm()).item() * noise.to(own)


def little(own: torch.Tensor, everyone: torch.Tensor) -> torch.Tensor:
    """Mean less 1.5 standard deviations of all updates: "a little is enough" (Baruch et al. 2019, arXiv 1902.06156,
    Algorithm 3, with the z of its experiments)."""
    return everyone.mean(dim=0) - 1.5 * everyone.std(dim=0)


def boosted(own: torch.Tensor, everyone: torch.Tensor) -> torch.Tensor:
    """The update times the number of clients: model replacement (Bagdasaryan et al. 2020, arXiv 1807.00459, eq. 3)."""
    return len(everyone) * own


def label_flip(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Answers of other tokens, each counted from the vocabulary's other end."""
    labels = batch["labels"]
    return batch | {"labels": torch.where(labels == IGNORED, labels, 2047 - labels)}


def backdoor(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Prompts that begin with the trigger have the target for an answer, in every second row."""
    half, labels = slice(None, None, 2), batch["labels"]
    poisoned = {name: values.clone() for name, values in batch.items()}
    answers = labels[half] != IGNORED
    poisoned["input_ids"][half, 1] = TRIGGER
    poisoned["input_ids"][half][answers] = TARGET
    poisoned["labels"][half][answers] = TARGET
    return poisoned


# Name -> (what is done to the rows, what is sent).
ATTACKS: dict[str, tuple[Poison | None, Lie | None]] = {
    "1e6 times": (None, scaled),
    "-10 times": (None, sign_flip),
    "Gaussian": (None, gaussian),
    "label flip": (label_flip, None),
    "a little is enough": (None, little),
    "backdoor": (backdoor, boosted),
}


def attack(poison: Poison | None, lie: Lie | None, bad: set[int]) -> None:
    """Have clients of this process's runs be bad ones, from now on."""
    begin, exchange = ClientSide.begin, LocalClients.exchange

    def begin_badly(self: ClientSide, message: ToClient, batches: Iterable):
        return begin(self, message, map(poison, batches) if poison and message.client in bad else batches)

    def exchange_badly(self: LocalClients, learning_rate: float) -> Exchange:
        carry = exchange(self, learning_rate)

        def carried(round_index: int, attempt: int, messages: Iterator[ToClient]):
            # What a client has trained is overwritten by the next one: each update is taken as it comes.
            answers = [
                (message, answer, update_of(message, answer))
                for message, answer in carry(round_index, attempt, messages)
            ]
            everyone = torch.stack([update for _, _, update in answers])
            for message, answer, update in answers:
                if lie is not None and message.client in bad:
                    update = lie(update, everyone)
                if isinstance(answer, FromClient):
                    sent = message.adapter.decoded + update
                    answer = replace(answer, adapter=Encoded(sent, sent.numel()))
                yield message, answer

        return carried

    ClientSide.begin, LocalClients.exchange = begin_badly, exchange_badly  # type: ignore[method-assign]


def update_of(message: ToClient, answer: Answer) -> torch.Tensor:
    """What a client has learned; nothing where it has failed."""
    known = message.adapter.decoded
    if isinstance(answer, Exception) or answer.adapter is None:
        return torch.zeros_like(known)
    return answer.adapter.arrive(known) - known


@torch.no_grad()
def backdoor_success(model: PreTrainedModel, rows: Dataset) -> float:
    """The part of prompts with the trigger whose answer begins with the target, of those that do not without it."""
    hits = []
    for row in rows:
        start = next(place for place, label in enumerate(row["labels"]) if label != IGNORED)
        prompt = torch.tensor([row["input_ids"][:start]], device=model.device)
        prompt[0, 1] = TRIGGER
        hits.append(model(input_ids=prompt).logits[0, -1].argmax().item() == TARGET)
    return sum(hits) / len(hits)
