"""Whole runs under differential privacy, and with bad clients."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import lora, write_secret
from transformers import TrainerCallback

from hf_devft import DevFTTrainer
from hf_devft.federation.client_side import Exchange
from hf_devft.federation.encoding import Encoded
from hf_devft.federation.privacy import ClientAccountant, RecordAccountant
from hf_devft.hub.push import stage_push
from hf_devft.models.adapter_files import load_adapter
from hf_devft.trainer.federated_run import planned_draws
from hf_devft.trainer.local_clients import LocalClients


PRIVATE = {"dp_noise_multiplier": 0.5, "dp_clipping_norm": 1.0, "num_clients": 12, "clients_per_round": 4}


def test_what_a_private_run_writes_says_what_it_cost_and_nothing_of_a_client(make_trainer, tmp_path):
    write_secret(tmp_path / "run")
    trainer = make_trainer(output_dir=tmp_path / "run", **PRIVATE)
    trainer.train()
    spent = [ClientAccountant(0.5, 4).epsilon([12] * count) for count in range(1, len(trainer.ledger.rounds) + 1)]
    assert [record.epsilon for record in trainer.ledger.rounds] == spent
    assert [stage.totals["epsilon"] for stage in trainer.stages] == [spent[1], spent[-1]]
    for record in trainer.ledger.rounds:  # as many as are expected, whoever was drawn
        values = sum(tensor.numel() for tensor in trainer.run.adapter.state.values())
        size = 4 * values * trainer.stages[record.stage - 1].num_layers // 4
        assert (record.bytes_down, record.bytes_up) == (4 * size, 4 * size)
    logged = [row for row in trainer.state.log_history if "learning_rate" in row]
    assert [row["epsilon"] for row in logged] == spent
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"ε = {spent[-1]:.2f}" in card
    assert "clipped to a norm of 1.0, noise of 0.5 of that in their sum, Poisson sampling, δ = 1e-05" in card
    for stage in ("stage-1", "stage-2"):
        folder = tmp_path / "run" / stage
        ledger = json.loads((folder / "ledger.json").read_text())
        untold = ("clients", "dropped", "loss", "tokens", "peak_memory")
        assert all([row[name] for name in untold] == [[], [], None, 0, 0] for row in ledger)
        assert not any("checksum" in name for name in json.loads((folder / "devft_state.json").read_text())["setting"])
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        assert not any({"loss", "grad_norm", "train_loss"} & row.keys() for row in history)
        assert not list(folder.rglob("privacy_secret"))
    assert (tmp_path / "run" / "privacy_secret").exists()


@pytest.mark.parametrize("options", [{}, {"dp_sampling": "fixed_size", "dp_clipping_norm": 0.5}])
def test_two_secrets_differ_and_the_config_does_not_give_the_noise_away(make_trainer, tmp_path, options):
    adapters = []
    for name, secret in (("a", 1), ("b", 1), ("c", 2)):
        write_secret(tmp_path / name, secret)
        make_trainer(output_dir=tmp_path / name, **PRIVATE | options).train()
        adapters.append(load_adapter(tmp_path / name)[1])
    assert all(torch.equal(adapters[0][key], adapters[1][key]) for key in adapters[0])
    assert not all(torch.equal(adapters[0][key], adapters[2][key]) for key in adapters[0])


def test_the_noise_is_found_for_a_budget_before_the_run(make_trainer):
    trainer = make_trainer(
        **{**PRIVATE, "dp_noise_multiplier": None}, dp_target_epsilon=8.0, federated_method="ffa_lora+fedavgm"
    )
    trainer.train()
    assert len(trainer.ledger.rounds) == trainer.run.num_rounds == sum(stage.rounds for stage in trainer.stages)
    assert 7.9 < trainer.ledger.rounds[-1].epsilon <= 8.0


def test_rounds_stay_accounted_for_by_the_noise_and_the_clients_they_had(make_trainer):
    """Whatever clients can hold today, and however rounds are dealt out to stages."""
    options = {**PRIVATE, "dp_noise_multiplier": None} | {
        "dp_target_epsilon": 8.0, "client_max_layers": [2, 4], "save_strategy": "steps", "save_steps": 1,
        "max_steps": 3,
    }  # fmt: skip
    trainer = make_trainer(stage_rounds=[2, 2], **options)
    trainer.train()
    assert [record.drawn_from for record in trainer.ledger.rounds] == [12, 12, 6]
    with pytest.raises(ValueError, match="is of a run with differential privacy"):
        make_trainer(stage_rounds=[1, 3], **options).train(resume_from_checkpoint=True)
    run = trainer.run
    run.capacities.lower(1, 2, 4)
    assert run.capacities.taking_part(2).keys() == {3, 5, 7, 9, 11}
    assert planned_draws(run.args, run.stages, run.capacities, run.ledger.rounds) == [12, 12, 6]


def test_rounds_are_accounted_for_by_their_own_stage(make_trainer):
    """Though one before has ended early."""

    class Impatient(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = state.global_step == 1

    trainer = make_trainer(**PRIVATE, client_max_layers=[2, 4], stage_rounds=[3, 2], callbacks=[Impatient()])
    trainer.train()
    assert [(record.stage, record.drawn_from) for record in trainer.ledger.rounds] == [(1, 12), (2, 6), (2, 6)]
    assert trainer.ledger.rounds[-1].epsilon == ClientAccountant(0.5, 4).epsilon([12, 6, 6])


def test_a_private_run_that_goes_on_with_fewer_rounds_trains_no_more(make_trainer):
    options = {**PRIVATE, "save_strategy": "steps", "save_steps": 1}
    make_trainer(max_steps=3, **options).train()
    resumed = make_trainer(max_steps=2, **options)
    resumed.train(resume_from_checkpoint="last")
    assert len(resumed.ledger.rounds) == 3


def test_a_run_ends_before_its_budget_does(make_trainer, caplog):
    budget = ClientAccountant(0.5, 4).epsilon([12] * 3)
    trainer = make_trainer(**PRIVATE, dp_target_epsilon=budget)
    assert "lasts for 3 of 4 rounds" in caplog.text
    trainer.train()
    assert [record.epsilon <= budget for record in trainer.ledger.rounds] == [True] * 3
    assert (Path(trainer.args.output_dir) / "stage-2" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dp_target_epsilon": 1e-3}, "does not last for a round"),
        ({"dp_clipping_norm": "adaptive", "dp_noise_multiplier": 1.0}, "needs more clients a round"),
        ({"dp_clipping_norm": "none"}, 'give a norm above 0, or "adaptive"'),
        ({"dp_clipping_norm": -1.0}, "give a norm above 0"),
        ({"dp_noise_multiplier": 0.0}, "give a number above 0"),
        ({"dp_noise_multiplier": None}, "without noise protects nobody"),
        ({"dp_delta": 0.1}, "laid bare"),
        ({"federated_method": "flora"}, "use ffa_lora, fedit or rolora"),
        ({"federated_method": "fedsa_lora"}, "published without noise"),
        ({"federated_method": "scaffold"}, "gradients without noise"),
        ({"federated_method": "median", "round_quorum": 3}, "its noise is made for a mean"),
        ({"client_selection": "by_size"}, "equal chances"),
        ({"dp_noise_multiplier": None, "dp_clipping_norm": None, "dp_delta": 1e-6}, "dp_delta=1e-06 without noise"),
        ({"client_eval_size": 0.2, "eval_dataset": None}, "metrics of clients' rows"),
    ],
)
def test_what_cannot_be_private_is_refused(make_trainer, options, says):
    with pytest.raises(ValueError, match=says):
        make_trainer(**PRIVATE | options)


def test_a_resumed_run_needs_its_secret(make_trainer, tmp_path):
    options = PRIVATE | {"output_dir": tmp_path / "run", "save_strategy": "steps", "save_steps": 1}
    make_trainer(**options).train()
    (tmp_path / "run" / "privacy_secret").unlink()
    with pytest.raises(ValueError, match=r"privacy_secret is missing, by which this run's .*: put it back"):
        make_trainer(**options).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    elsewhere = make_trainer(**options | {"output_dir": tmp_path / "elsewhere"})
    elsewhere.train(resume_from_checkpoint=str(tmp_path / "run" / "stage-1"))


def test_a_second_training_of_a_private_run_is_refused(make_trainer):
    """It would go on from an adapter whose cost nobody counts."""
    trainer = make_trainer(**PRIVATE, save_strategy="steps", save_steps=1)
    trainer.train()
    with pytest.raises(ValueError, match="another `train` would go on from an adapter whose private rounds"):
        trainer.train()
    assert len(trainer.ledger.rounds) == 4


def test_nothing_that_is_pushed_tells_of_what_clients_keep(make_trainer, tmp_path):
    """A lossy wire leaves values out, which each client that has taken part remembers."""
    trainer = make_trainer(output_dir=tmp_path / "run", **PRIVATE, wire_dtype="int8", save_strategy="steps")
    trainer.train()
    pushed = [each for stage in (1, 2) for each in stage_push(tmp_path / "run", stage).operations()]
    assert (tmp_path / "run" / "stage-1" / "federation.safetensors").exists()
    texts = [Path(each.path_or_fileobj).read_text(errors="replace") for each in pushed]
    assert not any("federation.safetensors" in text for text in texts)
    assert all(stage.totals["setup_peak_memory"] == 0 for stage in trainer.stages)
    resumed = make_trainer(output_dir=tmp_path / "run", **PRIVATE, wire_dtype="int8", save_strategy="steps")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "stage-1"))
    assert len(resumed.ledger.rounds) == 4


RECORDS = {
    "dp_level": "record", "dp_noise_multiplier": 0.8, "dp_delta": 1e-3, "num_clients": 4, "clients_per_round": 2,
    "local_steps": 3, "per_device_train_batch_size": 5,
}  # fmt: skip


def test_records_are_private_within_each_client(make_trainer, tmp_path):
    write_secret(tmp_path / "run")
    trainer = make_trainer(output_dir=tmp_path / "run", **RECORDS)
    trainer.train()
    asked = [trainer.run.federation.selection.sampled(index) for index in range(len(trainer.ledger.rounds))]
    accountant = RecordAccountant(0.8, tuple(trainer.clients.examples), 5, 3, 1e-3)
    spent = [accountant.epsilon(asked[: count + 1]) for count in range(len(asked))]
    assert [record.epsilon for record in trainer.ledger.rounds] == spent
    assert 0 < spent[0] < spent[-1]
    card = (tmp_path / "run" / "README.md").read_text()
    assert "of each row, by DP-SGD within the clients: gradients clipped to a norm of 1.0, noise of 0.8 of" in card
    assert all((record.loss, record.tokens, record.flops) == (None, 0, 0) for record in trainer.ledger.rounds)
    assert trainer.state.num_input_tokens_seen == 0
    assert "for each row of a client: ε" in card


def test_private_rounds_cost_what_they_cost_whatever_rows_there_are_now(make_trainer, tasks, tmp_path):
    """More rows would make each round look cheaper than it was."""

    def trainer(rows: int, name: str):
        data = {f"client-{k}": tasks.select(range(rows * k, rows * (k + 1))) for k in range(4)}
        return make_trainer(train_dataset=data, output_dir=tmp_path / name, **RECORDS | {"num_clients": None})

    trainer(10, "run").train()
    stage = str(tmp_path / "run" / "stage-1")
    with pytest.raises(ValueError, match=r"are recorded to have cost ε = .* by the rows and clients that are given"):
        trainer(20, "other").train(resume_from_checkpoint=stage)
    trainer(10, "same").train(resume_from_checkpoint=stage)


def test_one_row_more_changes_a_clients_step_by_no_more_than_the_norm(make_trainer, tasks, monkeypatch):
    """Through a whole run: one round of one client, one step with all rows drawn, no noise."""
    monkeypatch.setattr("hf_devft.federation.privacy.record_level.gaussian", lambda count, *_: torch.zeros(count))

    def step(count: int) -> torch.Tensor:
        # Plain descent at rate 1 gives the gradient; divided by the batch size, which is 9 in both.
        options = {
            "stage_layers": [4], "stage_rounds": [1], "local_steps": 1, "per_device_train_batch_size": 9,
            "num_clients": None, "clients_per_round": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0,
            "dp_clipping_norm": 0.01, "overwrite_output_dir": True,
        }  # fmt: skip
        trainer = make_trainer(train_dataset={"a": tasks.select(range(count))}, **RECORDS | options)
        start = {key: value.clone() for key, value in trainer.run.adapter.state.items()}
        trainer.train()
        return torch.cat([(trainer.run.adapter.state[key] - value).flatten() for key, value in start.items()])

    fewer, more = step(8), step(9)
    assert 0 < (more - fewer).norm().item() <= 0.01 / 9 * 1.001
    assert fewer.norm().item() <= 8 * 0.01 / 9 * 1.001


HOWEVER = [
    {"temporary_head": True},
    {"activation_checkpointing": True},
    {"peft_config": lora(use_dora=True)},
    {"peft_config": lora(lora_dropout=0.2)},
    {"federated_method": "droppeft"},
]


@pytest.mark.parametrize("options", HOWEVER, ids=lambda options: next(iter(options)))
def test_whatever_the_model_does_rows_are_told_apart(make_trainer, options):
    """Each goes through the model by itself, so that its gradient can be clipped."""
    seen = []

    class Watched(DevFTTrainer):
        def training_step(self, model, inputs, *rest, **kwargs):
            seen.append(len(inputs["input_ids"]))
            return super().training_step(model, inputs, *rest, **kwargs)

    trainer = make_trainer(cls=Watched, **RECORDS | options)
    trainer.train()
    assert set(seen) == {1}
    assert all(tensor.isfinite().all() for tensor in trainer.run.adapter.state.values())


@pytest.mark.parametrize("method", ["ffa_lora+fedadam", "fedsa_lora", "flora", "median"])
def test_what_comes_after_the_noise_is_free(make_trainer, method):
    """Every method, as it only sees private updates."""
    options = RECORDS | ({"round_quorum": 3, "clients_per_round": 3} if method == "median" else {})
    spent = []
    for each in (method, "fedit"):
        trainer = make_trainer(**options, federated_method=each)
        trainer.train()
        spent.append([record.epsilon for record in trainer.ledger.rounds])
    assert spent[0] == spent[1]


def test_rows_and_noise_are_drawn_by_the_secret(make_trainer, tmp_path):
    adapters = []
    for name, secret in (("a", 1), ("b", 1), ("c", 2)):
        write_secret(tmp_path / name, secret)
        make_trainer(output_dir=tmp_path / name, **RECORDS).train()
        adapters.append(load_adapter(tmp_path / name)[1])
    assert all(torch.equal(adapters[0][key], adapters[1][key]) for key in adapters[0])
    assert not all(torch.equal(adapters[0][key], adapters[2][key]) for key in adapters[0])


def test_the_noise_of_records_is_found_for_a_budget(make_trainer):
    trainer = make_trainer(**RECORDS | {"dp_noise_multiplier": None}, dp_target_epsilon=6.0)
    trainer.train()
    assert 5.9 < trainer.ledger.rounds[-1].epsilon <= 6.0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dp_clipping_norm": "adaptive"}, "dp_clipping_norm='adaptive': give a norm above 0"),
        ({"dp_level": "token"}, "dp_level='token'"),
        ({"dp_delta": 0.1}, "rows be laid bare"),
        ({"federated_method": "scaffold"}, "behind the noise"),
        ({"federated_method": "flexlora"}, "ranks that a client does not have"),
        ({"gradient_accumulation_steps": 2}, "set it to 1"),
        ({"auto_find_batch_size": True}, "through the model alone"),
        ({"dp_noise_multiplier": None}, "without noise protects nobody"),
        ({"dp_sampling": "fixed_size"}, "rows are drawn by chance alone"),
        ({"client_resources": "simulated"}, "tells of its rows"),
        ({"train_sampling_strategy": "group_by_length"}, "chance draws the rows"),
        ({"client_selection": "by_size"}, "equal chances"),
    ],
)
def test_what_keeps_records_from_being_private_is_refused(make_trainer, options, says):
    with pytest.raises(ValueError, match=says):
        make_trainer(**RECORDS | options)


@pytest.mark.parametrize(
    ("method", "quorum", "says"),
    [
        ("krum", 3, "needs the updates of 5 clients: set round_quorum to 5"),
        ("flexlora+median", 5, "updates that stand for the same"),
        ("scaffold+median", 5, "go unwatched"),
    ],
)
def test_what_no_rule_can_defend_is_refused(make_trainer, method, quorum, says):
    with pytest.raises(ValueError, match=says):
        make_trainer(federated_method=method, round_quorum=quorum, num_clients=6, clients_per_round=5)


def have_lie(monkeypatch, liar: int, scale: float) -> None:
    """Have a client send `scale` times its update, whatever it has trained."""
    exchange = LocalClients.exchange

    def with_a_liar(clients: LocalClients, learning_rate: float) -> Exchange:
        def carry(round_index, attempt, messages):
            for message, answer in exchange(clients, learning_rate)(round_index, attempt, messages):
                if message.client == liar:
                    known = message.adapter.decoded
                    learned = known if answer.adapter is None else answer.adapter.arrive(known)
                    lie = known + scale * (learned - known)
                    answer = replace(answer, adapter=Encoded(lie, lie.numel()))
                yield message, answer

        return carry

    monkeypatch.setattr(LocalClients, "exchange", with_a_liar)


FIVE = {"num_clients": 5, "clients_per_round": 5, "stage_layers": [4], "stage_rounds": [2]}


def test_rules_survive_a_client_that_sends_a_million_times_its_update(make_trainer, monkeypatch):
    def norm_after(method: str, quorum: int = 1) -> float:
        trainer = make_trainer(federated_method=method, round_quorum=quorum, peft_config=lora(r=4), **FIVE)
        trainer.train()
        return sum(tensor.square().sum().item() for tensor in trainer.run.adapter.state.values()) ** 0.5

    honest = norm_after("fedit")
    have_lie(monkeypatch, liar=2, scale=1e6)
    assert norm_after("fedit") > 1e3 * honest
    rules = ("median", "trimmed_mean", "geometric_median", "krum", "multi_krum", "norm_clipping", "fedavgm+median")
    norms = {rule: norm_after(rule, quorum=5) for rule in rules}
    assert all(norm < 1.5 * honest for norm in norms.values()), (honest, norms)
