"""`FederationMixin`: the federation that a config asks for, on a trainer's data and processes."""

from collections.abc import Iterable

import numpy as np
import pyarrow
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch.utils.data import DataLoader

from hf_devft.checkpoint import Checkpoint
from hf_devft.configuration import StageConfig
from hf_devft.federation.batches import ClientBatches, FederatedBatchSampler, ShareCollator
from hf_devft.federation.memory import Memory
from hf_devft.federation.methods import Clients, make_methods
from hf_devft.federation.methods.droppeft import DropPEFT
from hf_devft.federation.methods.fedit import FedIT
from hf_devft.federation.resources import load_resources, make_resources
from hf_devft.federation.rounds import Federation
from hf_devft.federation.sampling import turns
from hf_devft.federation.selection import SELECTIONS, ClientSelection
from hf_devft.federation.wire import Wire
from hf_devft.layout import AdapterLayout, lora_scaling
from hf_devft.metrics import IGNORED
from hf_devft.stages.principal import moves_weights
from hf_devft.stages.supported import uneven_options


class FederationMixin:
    """Makes the `Federation` of a trainer, and refuses what cannot be combined."""

    def _make_federation(self, checkpoint: Checkpoint | None = None) -> Federation:
        """The federation of all rounds to come."""
        args = self.args
        memory = Memory()
        if checkpoint is not None:
            memory.load_state_dict(checkpoint.run.federation)
        clients = Clients(
            examples=[len(rows) for rows in self.clients.rows.values()],
            seed=args.seed,
            label_counts=self._label_counts,
            memory=memory,
        )
        method, correction, optimizer = make_methods(args.federated_method, args.federated_method_kwargs)
        method.begin_run(clients)
        if correction is not None:
            correction.begin_run(clients, method)
        selection = self._make_selection(clients.examples)
        return Federation(
            method=method,
            correction=correction,
            optimizer=optimizer,
            wire=Wire(args.wire_dtype, args.wire_top_k, memory),
            memory=memory,
            selection=selection,
            placement=self.placement,
            names=self.clients.names,
            quorum=args.round_quorum,
            retries=args.round_retries,
            batches_of=lambda rounds, attempt: self._make_batches(turns(selection, self.placement, rounds, attempt)),
            add_up=self._add_up,
            gather=lambda item: gather_object([item]),
            device=args.device,
        )

    def _make_selection(self, examples: list[int]) -> ClientSelection:
        args = self.args
        try:
            selection = SELECTIONS[args.client_selection](**args.client_selection_kwargs or {})
        except TypeError as error:
            raise ValueError(f"client_selection_kwargs={args.client_selection_kwargs}: {error}") from error
        resources = None
        if args.client_resources == "simulated" or (selection.needs_resources and args.client_resources is None):
            resources = make_resources(len(examples), args.seed)
        elif args.client_resources is not None:
            resources = load_resources(args.client_resources, self.clients.names)
        selection.begin_run(args.clients_per_round, examples, args.client_dropout_rate, args.seed, resources)
        return selection

    def _candidates(self, stage: StageConfig) -> list[int]:
        """The clients that can take part in a stage."""
        return [client for client in range(len(self.clients.rows)) if self._held_by(client, stage) is not None]

    def _shares(self, stage: StageConfig) -> dict[int, float]:
        """Each client that can take part, and what part of the stage's adapter it has."""
        running, smaller = self.engine.layout, self._running.smaller
        whole = sum(running.sizes)
        held = {client: self._held_by(client, stage).stage for client in self._candidates(stage)}
        return {
            client: sum(smaller[number].engine.layout.sizes) / whole if number in smaller else 1.0
            for client, number in held.items()
        }

    def _held_by(self, client: int, stage: StageConfig) -> StageConfig | None:
        """The stage whose submodel a client trains in this one: this, an earlier one, or none."""
        most = self.args.client_max_layers
        if most is None or most[client % len(most)] >= stage.num_layers:
            return stage
        earlier = self.stages[: stage.stage - 1] if self.args.beyond_capacity == "keep_last" else []
        return next((one for one in reversed(earlier) if most[client % len(most)] >= one.num_layers), None)

    def _check_federation(self) -> None:
        """Refuse what the method cannot do, before any work."""
        federation, args = self._make_federation(), self.args
        shapes = tuple(tensor.shape for tensor in self._full_adapter.values())
        layout = AdapterLayout(tuple(self._full_adapter), shapes, lora_scaling(self.peft_config))
        federation.method.begin_stage(layout, torch.zeros(sum(layout.sizes)))
        name = f"federated_method={args.federated_method!r}"
        self._check_factors(federation, layout, name)
        records = federation.correction is not None and federation.correction.records
        if self.is_deepspeed_enabled and federation.method.partial and args.weight_decay:
            raise ValueError(f"{name} freezes parts of the adapter, which DeepSpeed decays: set `weight_decay` to 0.")
        if args.auto_find_batch_size and records:
            raise ValueError(
                f"{name} adds up gradients, also of steps that run out of memory: no auto_find_batch_size."
            )
        if federation.selection.needs_resources and (records or not federation.method.waits):
            raise ValueError(
                f"{name} needs all of a round's updates together, so none can come late: use another "
                "`client_selection`."
            )
        lossy = args.wire_dtype != "fp32" or args.wire_top_k < 1
        remembers = federation.memory.state_dict() or federation.method.needs_room or records
        if args.temporary_head and (lossy or remembers):
            raise ValueError(
                f"{name} remembers values of the adapter from round to round, also with a lossy wire, and "
                "temporary_head drops some of them: leave one out."
            )
        if args.beyond_capacity == "keep_last":
            self._check_smaller(federation, name)
        if not federation.method.needs_room:
            return
        if args.transfer == "anchor":
            raise ValueError(
                f'{name} adds to the base\'s weights, and transfer="anchor" would drop what other layers have: use '
                '"broadcast" or "split".'
            )
        if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise ValueError(f"{name} changes the base's weights, which are not whole under ZeRO-3: use ZeRO-2.")
        if getattr(self.model, "is_quantized", False) or getattr(self.model.get_base_model(), "is_quantized", False):
            raise ValueError(f"{name} changes the base's weights: use a base that is not quantised.")
        if any("lora_embedding" in key for key in layout.keys):
            raise ValueError(f"{name} cannot change embeddings: leave them out of `target_modules`.")

    def _check_factors(self, federation: Federation, layout: AdapterLayout, name: str) -> None:
        method, config = federation.method, self.peft_config
        if (method.factors or method.products) and not layout.pairs:
            raise ValueError(f"{name} is about LoRA's factors, which {config.peft_type.value} lacks: use LoRA.")
        if method.products and (given := uneven_options(config)):
            raise ValueError(
                f"{name} works with products of LoRA's factors, of one rank and scale everywhere: leave out "
                f"{', '.join(given)}."
            )
        if method.products and moves_weights(config):
            raise ValueError(
                f"{name} works with products of LoRA's factors, into which "
                f"init_lora_weights={config.init_lora_weights!r} puts a part of the weights: use another."
            )
        base = self.model.get_base_model()
        plain = base.main_input_name == "input_ids" and not base.config.is_encoder_decoder
        if isinstance(method, DropPEFT) and not plain:
            raise ValueError(f"{name} leaves out layers of models with one stack that read tokens: use another.")

    def _check_smaller(self, federation: Federation, name: str) -> None:
        if type(federation.method) is not FedIT or federation.correction is not None or self.args.temporary_head:
            raise ValueError(
                f'beyond_capacity="keep_last" takes updates of other depths, which {name} or temporary_head does not: '
                'use "fedit", with or without a server optimiser, or "sit_out".'
            )
        if self.is_deepspeed_enabled or self.placement.shares_batches:
            raise ValueError(
                'beyond_capacity="keep_last" trains two submodels in turns, each on one process: set '
                'client_placement="client_parallel", without DeepSpeed, or "sit_out".'
            )

    def _label_counts(self) -> np.ndarray:
        """How often each token is a label of each client, clients x vocabulary."""
        if not isinstance(self.train_dataset, Dataset) or "labels" not in self.train_dataset.column_names:
            raise ValueError(
                f"federated_method={self.args.federated_method!r} needs the distribution of the clients' labels: pass "
                "a dataset of text, or with a column `labels`."
            )
        labels = self.train_dataset.with_format("arrow")["labels"].combine_chunks()
        if isinstance(labels, pyarrow.ListArray):
            row_of = np.repeat(np.arange(len(labels)), np.diff(labels.offsets.to_numpy()))
            labels = labels.values
        else:
            row_of = np.arange(len(labels))  # one class a row
        tokens = labels.to_numpy(zero_copy_only=False)
        client_of = np.full(len(self.train_dataset), -1)  # nobody's: held out
        for client, rows in enumerate(self.clients.rows.values()):
            client_of[rows] = client
        kept = (tokens != IGNORED) & (client_of[row_of] >= 0)
        counts = np.zeros((len(self.clients.rows), int(tokens.max()) + 1))
        np.add.at(counts, (client_of[row_of[kept]], tokens[kept]), 1)
        return counts

    def _add_up(self, tensor: torch.Tensor) -> None:
        if self.args.world_size > 1:
            torch.distributed.all_reduce(tensor)

    def _make_batches(self, order: Iterable[tuple[int, int]]) -> ClientBatches:
        """The batches of local trainings in this `order`, from one data loader."""
        args, dataset, collator = self.args, self.train_dataset, self.data_collator
        if isinstance(dataset, Dataset):
            dataset = self._remove_unused_columns(dataset, description="Training")
        else:
            collator = self._get_collator_with_removed_columns(collator, description="Training")
        batches_per_client = args.local_steps * args.gradient_accumulation_steps
        sampler = FederatedBatchSampler(
            rows=list(self.clients.rows.values()),
            turns=order,
            batches_per_client=batches_per_client,
            batch_size=args.train_batch_size,
            drop_last=args.dataloader_drop_last,
            data_seed=args.seed if args.data_seed is None else args.data_seed,
            placement=self.placement,
        )
        loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=ShareCollator(collator, dataset[0]) if self.placement.shares_batches else collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return ClientBatches(loader, batches_per_client)

    def _expected_flops(self, per_token: tuple[float, ...]) -> list[float]:
        """What a round asks of each client, by the mean length of its rows; nothing without a clock."""
        args, dataset = self.args, self.train_dataset
        rows = args.local_steps * args.gradient_accumulation_steps * args.train_batch_size
        if self._federation.selection.resources is None:
            return []
        if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names or len(per_token) > 1:
            raise ValueError(
                "client_resources needs rows of `input_ids` (or text), to know how long a round takes, and a model of "
                "one stack of layers."
            )
        lengths = np.diff(dataset.with_format("arrow")["input_ids"].combine_chunks().offsets.to_numpy())
        return [float(rows * lengths[own].mean() * per_token[0]) for own in self.clients.rows.values()]
