import logging

import pytest
import torch
from conftest import lora, tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel, Trainer

from hf_devft import DevFTTrainer
from hf_devft.models.counted_logits import _CountedLogits
from hf_devft.trainer import stage_runner


OPTIONS = {"clients_per_round": 4, "client_placement": "client_parallel"}


def run(make_trainer, output_dir, count, **kwargs):
    trainer = make_trainer(output_dir=output_dir, clients_per_batch=count, **OPTIONS | kwargs)
    trainer.train()
    return trainer


def adapter(trainer) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in trainer.run.adapter.state.values()])


def trained_together(trainer, monkeypatch) -> list[int]:
    """How many clients each batch is going to have."""
    seen, train = [], stage_runner.train_together

    def watched(hooks, engine, axis, batches, pad_token):
        seen.append(len(batches))
        return train(hooks, engine, axis, batches, pad_token)

    monkeypatch.setattr(stage_runner, "train_together", watched)
    return seen


def test_clients_in_one_batch_leave_logits_out(make_trainer, tmp_path, monkeypatch):
    """Neither they nor a client alone gives the output embeddings a token without a label."""
    most = {}
    for count in (1, 2):
        trainer = make_trainer(output_dir=tmp_path / str(count), clients_per_batch=count, **OPTIONS)
        tokens, tail = [], _CountedLogits._tail

        def watched(counted, decoded, hidden, tokens=tokens, tail=tail):
            tokens.append(len(hidden))
            return tail(counted, decoded, hidden)

        monkeypatch.setattr(_CountedLogits, "_tail", watched)
        trainer.train()
        monkeypatch.undo()
        most[count] = sum(tokens)
    assert most[1] == most[2] > 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"federated_method": "ffa_lora"},
        {"federated_method": "rolora"},
        {"federated_method": "flora"},
        {"federated_method": "fedadam", "wire_dtype": "int8"},
        {"optim": "sgd", "max_grad_norm": 0.0, "weight_decay": 0.1},
        {"activation_checkpointing": True, "include_num_input_tokens_seen": "non_padding"},
        {"per_device_train_batch_size": 20},  # more than some clients have rows: other batch sizes
    ],
    ids=str,
)
def test_clients_in_one_batch_end_as_one_after_another(make_trainer, tmp_path, monkeypatch, options):
    alone = run(make_trainer, tmp_path / "alone", 1, partition="dirichlet", partition_column="family", **options)
    kwargs = {"partition": "dirichlet", "partition_column": "family", **options}
    trainer = make_trainer(output_dir=tmp_path / "together", clients_per_batch=3, **OPTIONS | kwargs)
    seen = trained_together(trainer, monkeypatch)
    trainer.train()
    assert seen == [3] * 4, "chunks of three clients and one that is alone, in four rounds"
    error = (adapter(trainer) - adapter(alone)).norm() / adapter(alone).norm()
    assert error < (0.03 if "wire_dtype" in options else 1e-3)
    counted = [
        [(r.clients, r.bytes_down, r.bytes_up, r.tokens, r.flops) for r in each.ledger.rounds]
        for each in (alone, trainer)
    ]
    assert counted[0] == counted[1]
    assert trainer.state.num_input_tokens_seen == alone.state.num_input_tokens_seen
    losses = [[record.loss for record in each.ledger.rounds] for each in (alone, trainer)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


class OwnLoss(DevFTTrainer):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"cls": OwnLoss}, "OwnLoss has its own compute_loss"),
        ({"federated_method": "fedprox"}, "looks at each client's gradients"),
        ({"gradient_accumulation_steps": 2}, "steps are cut to save memory"),
        ({"optim": "adafactor"}, "may mix values"),
        ({"label_smoothing_factor": 0.1}, "the loss is the trainer's"),
        ({"peft_config": lora(lora_dropout=0.1)}, "there is dropout"),
        ({"peft_config": lora(target_modules=["q_proj", "embed_tokens"])}, "not on linear layers alone"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_trained_together_says_why(make_trainer, tmp_path, caplog, options, reason):
    with caplog.at_level(logging.WARNING, "hf_devft"):
        together = run(make_trainer, tmp_path / "together", 4, stage_rounds=[1], **options)
    assert caplog.text.count("clients are trained one after another") == 1
    assert reason in caplog.text
    caplog.clear()
    alone = run(make_trainer, tmp_path / "alone", 1, stage_rounds=[1], **options)
    assert "one after another" not in caplog.text
    assert torch.equal(adapter(together), adapter(alone))


def test_a_cpu_trains_one_client_after_another_unless_asked(make_trainer, monkeypatch, caplog):
    trainer = make_trainer(**OPTIONS)
    seen = trained_together(trainer, monkeypatch)
    trainer.train()
    assert not seen
    assert "one after another" not in caplog.text


def test_a_client_that_fails_or_diverges_does_so_alone(make_trainer, tmp_path):
    def broken(count):
        model = tiny_llama()
        trainer = make_trainer(model=model, output_dir=tmp_path / str(count), clients_per_batch=count, **OPTIONS)
        collate = trainer.data_collator
        ill = set(map(int, list(trainer.clients.rows.values())[1]))
        texts = {tuple(trainer.train_dataset[row]["input_ids"]) for row in ill}

        def fails(rows):
            if any(tuple(row["input_ids"]) in texts for row in rows):
                raise RuntimeError("a row of client 1 cannot be read")
            return collate(rows)

        trainer.data_collator = fails
        trainer.train()
        return trainer

    alone, together = broken(1), broken(4)
    assert [record.dropped for record in together.ledger.rounds] == [record.dropped for record in alone.ledger.rounds]
    assert together.ledger.rounds[0].dropped == [together.clients.names[1]]
    assert torch.equal(adapter(together), adapter(alone)), "its batch is trained one after another"


def refuses(message):
    def more_than_one_client(rows):
        if rows > 4:
            raise RuntimeError(message)

    return more_than_one_client


@pytest.mark.parametrize(
    ("happens", "reason"),
    [
        (refuses("CUDA out of memory. Tried to allocate more."), "the memory does not hold their batches together"),
        (refuses("no such kernel"), "together they fail: RuntimeError: no such kernel"),
        (lambda rows: torch.rand(1) if rows > 4 else None, "the model draws random numbers"),
    ],
    ids=["memory", "error", "random"],
)
def test_what_shows_only_when_it_runs_is_no_end(make_trainer, tmp_path, caplog, happens, reason):
    model = tiny_llama()

    def hook(module, args):
        if module.training:
            happens(len(args[0]))

    model.model.embed_tokens.register_forward_pre_hook(hook)
    together = run(make_trainer, tmp_path / "together", 4, model=model)
    assert caplog.text.count("clients are trained one after another") == 1
    assert reason in caplog.text
    assert torch.equal(adapter(together), adapter(run(make_trainer, tmp_path / "alone", 1)))


def test_rotary_embeddings_that_go_by_the_longest_row_are_refused(make_trainer, caplog):
    model = tiny_llama()
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    make = make_trainer(model=model, clients_per_batch=4, stage_rounds=[1], **OPTIONS)
    make.train()
    assert "its rotary embeddings depend on a batch's longest row" in caplog.text


def test_another_architecture(make_trainer, tmp_path):
    """Learned positions, a fused projection as `Conv1D`, and dropout that is turned off."""
    config = GPT2Config(
        vocab_size=2048, n_embd=16, n_layer=4, n_head=2, n_positions=256, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    found = []
    for count in (1, 4):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
        found.append(run(make_trainer, tmp_path / str(count), count, model=model))
    assert torch.allclose(adapter(found[0]), adapter(found[1]), atol=1e-4)


def test_the_hooks_are_those_of_the_trainer():
    from hf_devft.trainer.client_batching import HOOKS

    assert all(hasattr(Trainer, name) for name in HOOKS)


class LeavesTraining(DevFTTrainer):
    """Notes the mode of every module in each step, and leaves the model in that of evaluation."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.modes += [module.training for module in model.modules()]
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        model.eval()
        return loss


def test_every_step_is_in_training_mode(make_trainer):
    trainer = make_trainer(cls=LeavesTraining)
    trainer.modes = []
    trainer.train()
    assert trainer.modes
    assert all(trainer.modes)
