"""That a run uses its parts: what each of them does is tested beside it, and would pass if nobody called it."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import write_secret

from hf_devft import DevFTTrainer
from hf_devft.models.engines import Engine
from hf_devft.run.checkpoint import load_federation
from hf_devft.trainer.local_clients import LocalClients
from hf_devft.trainer.stage_runner import StageRunner


# One round of one client by plain gradient descent.
STEPS = {
    "stage_layers": [4], "stage_rounds": [1], "num_clients": 1, "clients_per_round": 1, "optim": "sgd",
    "learning_rate": 0.1, "max_grad_norm": 0.0,
}  # fmt: skip


def flat(state) -> torch.Tensor:
    return torch.cat([state[key].flatten() for key in sorted(state)])


def change(trainer: DevFTTrainer) -> torch.Tensor:
    """Of the adapter, in a run."""
    start = flat(trainer.run.adapter.state).clone()
    trainer.train()
    return flat(trainer.run.adapter.state) - start


def test_gradients_of_parts_add_up_to_those_of_the_whole_batch(make_trainer):
    whole = change(make_trainer(**STEPS, local_steps=2, per_device_train_batch_size=12))
    parts = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    torch.testing.assert_close(change(make_trainer(**STEPS, local_steps=2, **parts)), whole, rtol=1e-3, atol=1e-6)


def test_a_corrections_gradient_is_added_once_a_step(make_trainer):
    """FedProx adds nothing at the start, and μ (θ₁ − θ₀) in the second step, in however many parts that is."""
    parts = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    one, two = (change(make_trainer(**STEPS, local_steps=steps, **parts)) for steps in (1, 2))
    options = {"federated_method": "fedprox", "federated_method_kwargs": {"mu": 3.0}}
    found = change(make_trainer(**STEPS, local_steps=2, **parts, **options))
    torch.testing.assert_close(found, two - 0.1 * 3.0 * one, rtol=1e-3, atol=1e-6)
    assert (0.1 * 3.0 * one).abs().max() > 1e-3


def test_clients_train_at_the_rounds_rate(make_trainer, monkeypatch):
    rates: list[float] = []
    begin = Engine.begin_client

    def watched(self, flat, learning_rate, trains=None):
        begin(self, flat, learning_rate, trains)
        if trains is not None:
            rates.append(self.optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(Engine, "begin_client", watched)
    trainer = make_trainer(
        stage_learning_rates=[1e-2, 2e-2], lr_scheduler_type="linear", clients_per_round=1, learning_rate=5e-3
    )
    trainer.train()
    assert rates == pytest.approx([1e-2, 1e-2 * 3 / 4, 2e-2 * 2 / 4, 2e-2 / 4])


def test_layers_that_a_client_skips_compute_nothing(make_trainer, monkeypatch):
    train, seen = StageRunner.train_model, []

    def watched(self, learning_rate, turn, engine, layers):
        calls: Counter[int] = Counter()

        def count(index, output):
            calls[index] += output.shape[1] > 1  # not the one token that a layer's kind of output is found out by

        handles = [
            layer.mlp.register_forward_hook(lambda _, inputs, output, index=index: count(index, output))
            for index, layer in enumerate(layers)
        ]
        result = train(self, learning_rate, turn, engine, layers)
        for handle in handles:
            handle.remove()
        seen.append((set(turn.skips), {index for index, times in calls.items() if times}, len(layers)))
        return result

    monkeypatch.setattr(StageRunner, "train_model", watched)
    make_trainer(federated_method="droppeft", stage_rounds=[3]).train()
    assert any(skipped for skipped, _, _ in seen)
    assert all(computed == set(range(count)) - skipped for skipped, computed, count in seen)


BEST = {
    "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
    "load_best_model_at_end": True, "metric_for_best_model": "loss", "stage_layers": [4], "stage_rounds": [3],
    "greater_is_better": True,  # so that the best round is the first
}  # fmt: skip


def test_the_best_round_s_clients_are_remembered(make_trainer, eval_tasks):
    trainer = make_trainer(federated_method="fedsa_lora", eval_dataset=eval_tasks, **BEST)
    trainer.train()
    assert trainer.state.best_global_step < 3
    best = load_federation(Path(trainer.state.best_model_checkpoint))
    now = trainer.run.federation.memory.state_dict()
    kept = {key for key in best if "/kept/" in key}
    assert kept
    assert kept == {key for key in now if "/kept/" in key}
    assert all(torch.equal(best[key], now[key]) for key in kept)


def test_the_best_round_outlives_the_limit_of_checkpoints(make_trainer, eval_tasks):
    trainer = make_trainer(eval_dataset=eval_tasks, save_total_limit=1, **BEST)
    trainer.train()
    best = trainer.state.best_global_step
    assert best < 3
    assert (Path(trainer.args.output_dir) / f"checkpoint-{best}").is_dir()
    measured = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert trainer.stages[0].metrics["eval_loss"] == measured[best - 1]


def test_a_run_that_was_moved_finds_its_best_round(make_trainer, eval_tasks, tmp_path):
    options = BEST | {"save_strategy": "best"}  # so that nothing is saved after the first round
    whole = make_trainer(eval_dataset=eval_tasks, output_dir=tmp_path / "whole", **options)
    whole.train()
    assert whole.state.best_global_step == 1
    make_trainer(eval_dataset=eval_tasks, output_dir=tmp_path / "a", max_steps=2, **options).train()
    (tmp_path / "a").rename(tmp_path / "b")
    moved = make_trainer(eval_dataset=eval_tasks, output_dir=tmp_path / "b", **options)
    moved.train(str(tmp_path / "b" / "checkpoint-1"))
    assert torch.equal(flat(moved.run.adapter.state), flat(whole.run.adapter.state))


def test_a_private_round_is_the_sum_of_clipped_updates_whoever_has_how_many_rows(make_trainer, tasks, monkeypatch):
    monkeypatch.setattr("hf_devft.federation.privacy.mechanism.gaussian", lambda count, *_: torch.zeros(count))
    updates: dict[int, torch.Tensor] = {}
    exchange = LocalClients.exchange

    def watched(self, learning_rate):
        def carry(*call):
            for message, answer in exchange(self, learning_rate)(*call):
                known = message.adapter.decoded
                updates[message.client] = (answer.adapter.arrive(known) - known).clone()
                yield message, answer

        return carry

    monkeypatch.setattr(LocalClients, "exchange", watched)
    rows = {f"client-{index}": tasks.select(range(10 * index, 10 * index + 2 + 7 * (index % 2))) for index in range(6)}
    trainer = make_trainer(
        train_dataset=rows, num_clients=None, stage_layers=[4], stage_rounds=[1], clients_per_round=3,
        dp_noise_multiplier=1.0, dp_clipping_norm=0.05, dp_sampling="fixed_size",
    )  # fmt: skip
    sizes = {key: tensor.numel() for key, tensor in trainer.run.adapter.state.items()}
    found = change(trainer)
    assert len(updates) == 3
    assert all(update.norm() > 0.05 for update in updates.values()), "all of them are clipped"
    expected = sum(0.05 * update / update.norm() for update in updates.values()) / 3
    parts = dict(zip(sizes, expected.split(list(sizes.values())), strict=True))
    torch.testing.assert_close(found, flat(parts), rtol=1e-2, atol=1e-5)


def test_who_takes_part_in_a_private_run_is_drawn_by_its_secret(make_trainer, tmp_path):
    drawn = []
    for name, secret in (("a", 1), ("b", 2)):
        write_secret(tmp_path / name, secret)
        trainer = make_trainer(
            output_dir=tmp_path / name, dp_noise_multiplier=0.5, dp_clipping_norm=1.0, num_clients=12,
            clients_per_round=4, stage_rounds=[3],
        )  # fmt: skip
        trainer.train()
        assert trainer.run.federation.retries == 0, "each attempt would cost"
        drawn.append([trainer.run.federation.selection.sampled(index) for index in range(6)])
    assert drawn[0] != drawn[1]
