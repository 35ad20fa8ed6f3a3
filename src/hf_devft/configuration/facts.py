"""What is known of a run by its config, adapter, model and trainer, fact by fact."""

import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftType
from transformers import PreTrainedModel, TrainingArguments

from hf_devft.federation.methods import (
    AGGREGATION_RULES,
    CORRECTIONS,
    METHODS,
    SERVER_OPTIMIZERS,
    Methods,
    make_methods,
)
from hf_devft.federation.methods.c2a import C2A
from hf_devft.federation.methods.dofit import DoFIT
from hf_devft.federation.methods.droppeft import DropPEFT
from hf_devft.federation.methods.fedit import FedIT
from hf_devft.federation.methods.fedsa_lora import FedSALoRA
from hf_devft.federation.methods.ffa_lora import FFALoRA
from hf_devft.federation.methods.flora import FLoRA
from hf_devft.federation.methods.heterogeneous import HeterogeneousRanks
from hf_devft.federation.methods.hetlora import HetLoRA
from hf_devft.federation.methods.lora import product_norm
from hf_devft.federation.methods.robust import Median, TrimmedMean
from hf_devft.federation.selection import SELECTIONS
from hf_devft.federation.wire import is_lossy
from hf_devft.models.adapter import chooses_layers, head_name
from hf_devft.models.initialisation import moves_weights
from hf_devft.models.layer_stack import find_layer_stack
from hf_devft.models.layout import AdapterLayout, State, uneven_options
from hf_devft.tasks import TASKS, answers_prompts


@dataclass(frozen=True)
class Setup:
    """What is known of a run when it is checked. What is None is not known yet, and conflicts with nothing.

    Attributes:
        args: its `DevFTConfig`.
        trainer: "devft", "sft" or "dpo".
        adapter: the config of its adapter.
        layout: the full-depth adapter's tensors; state: their values at the start.
        base: its model without adapter; may be on the meta device.
        num_stages: how many stages it has.
        mixed_precision: "no", "fp16" or "bf16".
        mean_over_tokens: whether the loss is a mean over all of a batch's tokens, however the batch is cut.
        has_processor: whether there is what encodes rows and decodes answers (a tokenizer, say).
        has_evaluation: whether there is an `eval_dataset`.
        server_rows: the server's own rows, `calibration_dataset`; False for none.
        remembers: whether the method has put something into its memory at the start of a stage.
        network: whether the clients are on other machines.
    """

    args: TrainingArguments
    trainer: str = "devft"
    adapter: PeftConfig | None = None
    layout: AdapterLayout | None = None
    state: State | None = None
    base: PreTrainedModel | None = None
    num_stages: int | None = None
    mixed_precision: str | None = None
    mean_over_tokens: bool | None = None
    has_processor: bool | None = None
    has_evaluation: bool | None = None
    server_rows: Any = None
    remembers: bool | None = None
    network: bool | None = None

    @cached_property
    def methods(self) -> Methods:
        """What `federated_method` names."""
        return make_methods(self.args.federated_method, self.args.federated_method_kwargs)

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage; 0 without DeepSpeed."""
        plugin = self.args.deepspeed_plugin
        return 0 if plugin is None else plugin.zero_stage

    @property
    def is_quantised(self) -> bool:
        """Whether the base is, or is to be loaded so."""
        asked = (self.args.model_init_kwargs or {}).get("quantization_config")
        return bool(asked) or bool(getattr(self.base, "is_quantized", False))


@dataclass(frozen=True)
class Fact:
    """Something that a run may have.

    Attributes:
        name: as the documentation has it.
        holds: (setup) -> whether the run has it; False where that is not known.
        said: (setup) -> as an error has it; default: the name.
    """

    name: str
    holds: Callable[[Setup], Any]
    said: Callable[[Setup], str] | None = None

    def describe(self, setup: Setup) -> str:
        """As an error has it."""
        return self.said(setup) if self.said is not None else self.name.replace("`", "")


def _given(*options: str) -> Callable[[Setup], str]:
    """The options as the user has given them."""
    return lambda setup: ", ".join(f"{option}={_value(setup, option)!r}" for option in options)


def _value(setup: Setup, option: str) -> Any:
    """As it holds, where it has a default that is another option's."""
    return getattr(setup.args, "fuses_adapters_by" if option == "adapter_fusion" else option)


def _all_are_anchors(setup: Setup, *options: str) -> bool:
    return {_value(setup, option) for option in options} <= {"anchor", "bridge"}


def _named(registry: Collection[str], default: str = "") -> Callable[[Setup], str]:
    """The part of `federated_method` that a registry knows."""

    def said(setup: Setup) -> str:
        parts = setup.args.federated_method.split("+")
        return f"federated_method={next((part for part in parts if part in registry), default)!r}"

    return said


_METHOD, _CORRECTION, _OPTIMIZER = _named(METHODS, "fedit"), _named(CORRECTIONS), _named(SERVER_OPTIMIZERS)
_RULE = _named(AGGREGATION_RULES)


def _trainer(setup: Setup) -> str:
    return f"DevFT{setup.trainer.upper()}Trainer (--trainer {setup.trainer})"


def _with(flag: str, value: bool = True) -> str:
    """The names of the methods that have a flag, for the documentation."""
    return ", ".join(f"`{name}`" for name, method in METHODS.items() if getattr(method, flag) == value)


def _method_is(name: str) -> Callable[[Setup], bool]:
    return lambda setup: getattr(setup.methods.method, name)


def _starts_trained(setup: Setup) -> bool:
    """Whether the products of the adapter that a run starts from are not zero."""
    if setup.state is None or setup.layout is None:
        return False
    tensors = [setup.state[key] for key in setup.layout.keys]
    factors = [(tensors[pair.a], tensors[pair.b]) for pair in setup.layout.pairs]
    return any(product_norm(a, b) > 1e-3 * a.norm() * b.norm() for a, b in factors)  # but for rounding


def _records(setup: Setup) -> bool:
    return setup.methods.correction is not None and setup.methods.correction.records


def _remembers(setup: Setup) -> bool:
    """Whether values of the adapter outlive a round, with a client or with the server."""
    method = setup.methods.method
    kept = setup.remembers or method.remembers or method.modifies_base_weights
    return _is_lossy(setup) or kept or _records(setup)


def _what_remembers(setup: Setup) -> str:
    """What makes values of the adapter outlive a round, as an error has it."""
    if _is_lossy(setup):
        return _given("wire_dtype", "upload_fraction")(setup)
    return _CORRECTION(setup) if _records(setup) else _METHOD(setup)


def _is_lossy(setup: Setup) -> bool:
    return is_lossy(setup.args.wire_dtype, setup.args.upload_fraction)


def _quantised_layers(setup: Setup) -> bool:
    """Whether there are weights that no optimiser can train."""
    base = setup.base
    return setup.is_quantised or (
        base is not None and not all(parameter.is_floating_point() for parameter in base.parameters())
    )


def _has_no_classes_to_compare(setup: Setup) -> bool:
    if setup.base is None:
        return False
    config = setup.base.config
    kind = getattr(config, "problem_type", None)
    return kind in ("regression", "multi_label_classification") or getattr(config, "num_labels", 2) == 1


def _is_no_language_model(setup: Setup) -> bool:
    if setup.base is None:
        return False
    return not answers_prompts(setup.args.task) or setup.base.get_output_embeddings() is None


def _reads_no_tokens_in_one_stack(setup: Setup) -> bool:
    base = setup.base
    return base is not None and (base.main_input_name != "input_ids" or base.config.is_encoder_decoder)


def _has_several_kinds_of_layers(setup: Setup) -> bool:
    return setup.base is not None and len(set(find_layer_stack(setup.base, setup.args.stack).kinds)) > 1


def _adapted_outside_of_layers(setup: Setup) -> list[str]:
    """The tensors of what PEFT chooses by layers and is in none; what is trained whole is not chosen so."""
    if setup.base is None or setup.layout is None:
        return []
    names = find_layer_stack(setup.base, setup.args.stack).names
    return [key for key in setup.layout.keys if ".lora_" in key and names.split(key) is None]


def _adapts_another_stack(setup: Setup) -> bool:
    return any(re.search(r"\.\d+\.", key) for key in _adapted_outside_of_layers(setup))


def _lacks_labels(setup: Setup) -> bool:
    rows = setup.server_rows
    return answers_prompts(setup.args.task) and isinstance(rows, Dataset) and "labels" not in rows.column_names


def _lacks_processor(setup: Setup) -> bool:
    return setup.has_processor is False and answers_prompts(setup.args.task)


def _adapts_head(setup: Setup) -> bool:
    head = None if setup.base is None else head_name(setup.base)
    return head is not None and setup.layout is not None and any(f".{head}." in key for key in setup.layout.keys)


def _placed(how: str, on_several: bool = False) -> Fact:
    """That work is placed so, maybe on several processes."""
    where = " on several processes" if on_several else ""
    return Fact(
        f'`client_placement="{how}"`{where}',
        lambda s: s.args.client_placement == how and (s.args.world_size > 1 or not on_several),
        _given("client_placement"),
    )


FACTS: dict[str, Fact] = {
    # the rules of a stage
    "rules that are not anchors": Fact(
        '`fusion`, `adapter_fusion` or `transfer` other than `"anchor"`',
        lambda s: not _all_are_anchors(s, "fusion", "adapter_fusion", "transfer"),
        _given("fusion", "adapter_fusion", "transfer"),
    ),
    "fused layers": Fact(
        '`fusion` or `adapter_fusion` other than `"anchor"`',
        lambda s: not _all_are_anchors(s, "fusion", "adapter_fusion"),
        _given("fusion", "adapter_fusion"),
    ),
    "fused adapters": Fact(
        '`adapter_fusion` other than `"anchor"`',
        lambda s: (
            not (_all_are_anchors(s, "adapter_fusion") or s.args.adapter_layers or len(s.args.stage_layers or ()) == 1)
        ),
        _given("adapter_fusion"),
    ),
    "transfer but broadcast": Fact(
        '`transfer` other than `"broadcast"`', lambda s: s.args.transfer != "broadcast", _given("transfer")
    ),
    "prefix": Fact('`grouping="prefix"`', lambda s: s.args.grouping == "prefix", _given("grouping")),
    "calibrated": Fact('`grouping="calibrated"`', lambda s: s.args.grouping == "calibrated", _given("grouping")),
    "bridges": Fact(
        '`fusion="bridge"` or `grouping="bridged"`',
        lambda s: s.args.fusion == "bridge" or s.args.grouping == "bridged",
        _given("grouping", "fusion"),
    ),
    "no bridges": Fact('`fusion` other than `"bridge"`', lambda s: s.args.fusion != "bridge", _given("fusion")),
    "scattered groups": Fact(
        '`grouping` of `"deconfliction"`, `"normalized_cut"` or `"random"`',
        lambda s: s.args.grouping in ("deconfliction", "normalized_cut", "random"),
        _given("grouping"),
    ),
    "groups by kind": Fact(
        '`fusion="bridge"` with `grouping` of `"even"`, `"calibrated"` or `"prefix"`',
        lambda s: s.args.fusion == "bridge" and s.args.grouping in ("even", "calibrated", "prefix"),
        _given("fusion", "grouping"),
    ),
    "several kinds of layers": Fact(
        "layers of several kinds, such as sliding and full attention", _has_several_kinds_of_layers
    ),
    "more than anchors receive": Fact(
        '`transfer` other than `"anchor"`', lambda s: s.args.transfer != "anchor", _given("transfer")
    ),
    "split": Fact('`transfer="split"`', lambda s: s.args.transfer == "split", _given("transfer")),
    "anchor transfer": Fact('`transfer="anchor"`', lambda s: s.args.transfer == "anchor", _given("transfer")),
    "temporary head": Fact("`temporary_head`", lambda s: s.args.temporary_head, _given("temporary_head")),
    "adapter stages": Fact("`adapter_layers`", lambda s: s.args.adapter_layers, _given("adapter_layers")),
    "submodels": Fact(
        "`stage_layers` of several stages", lambda s: len(s.args.stage_layers or ()) > 1, _given("stage_layers")
    ),
    "pattern of modules": Fact(
        "`target_modules` as one regular expression",
        lambda s: (
            isinstance(getattr(s.adapter, "target_modules", None), str) and s.adapter.target_modules != "all-linear"
        ),
        lambda s: f"target_modules={s.adapter.target_modules!r}",
    ),
    "modules outside of layers": Fact("an adapter on modules outside of the layers", _adapted_outside_of_layers),
    "anchors that come and go": Fact(
        '`transfer="anchor"` in three stages or more, but of `grouping="prefix"`',
        lambda s: s.args.transfer == "anchor" and s.args.grouping != "prefix" and (s.num_stages or 0) > 2,
        _given("transfer", "grouping"),
    ),
    "one stage": Fact("a single stage", lambda s: s.num_stages == 1),
    # the server's teaching
    "healing": Fact("`healing_steps`", lambda s: s.args.healing_steps, _given("healing_steps")),
    "distillation": Fact("`distillation_steps`", lambda s: s.args.distillation_steps, _given("distillation_steps")),
    "no texts": Fact(
        "no `calibration_dataset`",
        lambda s: s.server_rows is not None and not (isinstance(s.server_rows, Dataset) and len(s.server_rows)),
    ),
    "no calibration texts": Fact(
        "neither `calibration_dataset` nor `eval_dataset`",
        lambda s: s.server_rows is False and s.has_evaluation is False,
    ),
    "no labels": Fact("rows of `calibration_dataset` without `labels`", _lacks_labels),
    "no tokenizer": Fact("no `processing_class`", _lacks_processor),
    "no room for prompts": Fact(
        "`generation_max_new_tokens` of `max_length` or more",
        lambda s: s.args.generation_max_new_tokens >= s.args.max_length,
        _given("generation_max_new_tokens", "max_length"),
    ),
    # the model
    "quantised base": Fact("a quantised base", lambda s: s.is_quantised),
    "weights that cannot be trained": Fact("a quantised base", _quantised_layers),
    "base in fp16": Fact("a base in float16", lambda s: s.base is not None and s.base.dtype == torch.float16),
    "encoder and decoder": Fact(
        "a model with an encoder and a decoder", lambda s: s.base is not None and s.base.config.is_encoder_decoder
    ),
    "two stacks": Fact(
        "both stacks of a model with an encoder and a decoder",
        lambda s: s.base is not None and s.base.config.is_encoder_decoder and s.args.stack is None,
    ),
    "no language model": Fact("a model that does not predict next tokens", _is_no_language_model),
    "no classes": Fact("regression, or labels of which several are right", _has_no_classes_to_compare),
    "not one stack of tokens": Fact(
        "a model that reads no tokens, or has two stacks of layers", _reads_no_tokens_in_one_stack
    ),
    "no tokens": Fact(
        "a model that reads no tokens", lambda s: s.base is not None and s.base.main_input_name != "input_ids"
    ),
    # the adapter
    "DoRA": Fact("`LoraConfig(use_dora=True)`", lambda s: getattr(s.adapter, "use_dora", False)),
    "moved weights": Fact(
        "PiSSA and OLoRA",
        lambda s: s.adapter is not None and moves_weights(s.adapter),
        lambda s: f"init_lora_weights={s.adapter.init_lora_weights!r}",
    ),
    "orthogonal start": Fact(
        '`init_lora_weights="orthogonal"`',
        lambda s: getattr(s.adapter, "init_lora_weights", None) == "orthogonal",
    ),
    "chosen start": Fact(
        "`init_lora_weights`",
        lambda s: getattr(s.adapter, "init_lora_weights", True) is not True,
        lambda s: f"init_lora_weights={s.adapter.init_lora_weights!r}",
    ),
    "IA3": Fact("IA3", lambda s: s.adapter is not None and s.adapter.peft_type == PeftType.IA3),
    "adapted experts": Fact(
        "`target_parameters`, as a mixture's experts have them",
        lambda s: getattr(s.adapter, "target_parameters", None),
        lambda s: f"target_parameters={sorted(s.adapter.target_parameters)}",
    ),
    "adapted layers elsewhere": Fact("an adapter on numbered layers of another stack", _adapts_another_stack),
    "uneven adapter": Fact(
        "`rank_pattern`, `alpha_pattern`, `use_dora` or `target_parameters`",
        lambda s: isinstance(s.adapter, LoraConfig) and uneven_options(s.adapter),
        lambda s: ", ".join(uneven_options(s.adapter)),
    ),
    "no LoRA factors": Fact(
        "an adapter other than LoRA",
        lambda s: s.layout is not None and not s.layout.pairs,
        lambda s: "an adapter without LoRA's factors" if s.adapter is None else f"{s.adapter.peft_type.value}",
    ),
    "trained start": Fact("an adapter that was trained before", _starts_trained),
    "adapted embeddings": Fact(
        "an adapter on embeddings",
        lambda s: s.layout is not None and any("lora_embedding" in key for key in s.layout.keys),
    ),
    "no head": Fact(
        "a model without output embeddings",
        lambda s: s.base is not None and s.base.get_output_embeddings() is None,
        lambda s: f"{type(s.base).__name__}, which has no output embeddings",
    ),
    "adapted head": Fact("`target_modules` that have the output embeddings", _adapts_head),
    "chosen layers": Fact("`layers_to_transform`", lambda s: chooses_layers(s.adapter)),
    # methods, wire, participants
    "factors": Fact(
        f"methods about LoRA's factors ({_with('factors')})",
        _method_is("factors"),
        _METHOD,
    ),
    "products": Fact(
        f"methods about products of LoRA's factors ({_with('products')})",
        _method_is("products"),
        _METHOD,
    ),
    "changed base": Fact(
        f"methods that change the base's weights ({_with('modifies_base_weights')})",
        _method_is("modifies_base_weights"),
        _METHOD,
    ),
    "parts in turns": Fact(
        f"methods that train parts of the adapter ({_with('partial')})",
        _method_is("partial"),
        _METHOD,
    ),
    "not optimisable": Fact(
        f"methods whose rounds have no coordinates in common ({_with('optimizable', False)})",
        lambda s: not s.methods.method.optimizable,
        _METHOD,
    ),
    "fixed adapter": Fact(
        "methods by whose rules the server may not change the adapter (those whose rounds have no coordinates in "
        f"common, and {_with('factors')})",
        lambda s: (
            s.methods.method.factors or s.methods.method.modifies_base_weights or not s.methods.method.optimizable
        ),
        _METHOD,
    ),
    "no late updates": Fact(
        f"methods that need all of a round's updates at once ({_with('supports_late_updates', False)}, `scaffold`)",
        lambda s: _records(s) or not s.methods.method.supports_late_updates,
        lambda s: _CORRECTION(s) if _records(s) else _METHOD(s),
    ),
    "FLoRA": Fact("`flora`", lambda s: isinstance(s.methods.method, FLoRA), _METHOD),
    "FFA-LoRA": Fact("`ffa_lora`", lambda s: isinstance(s.methods.method, FFALoRA), _METHOD),
    "own ranks": Fact(
        "methods of clients of different ranks (`flexlora`, `hetlora`, `hlora`)",
        lambda s: isinstance(s.methods.method, HeterogeneousRanks),
        _METHOD,
    ),
    "own values": Fact(
        "methods of which clients or domains have values of their own (`c2a`, `dofit`, `fedsa_lora`)",
        lambda s: isinstance(s.methods.method, (C2A, DoFIT, FedSALoRA)),
        _METHOD,
    ),
    "DropPEFT": Fact("`droppeft`", lambda s: isinstance(s.methods.method, DropPEFT), _METHOD),
    "not FedIT": Fact("a method other than `fedit`", lambda s: type(s.methods.method) is not FedIT, _METHOD),
    "correction": Fact("`fedprox` and `scaffold`", lambda s: s.methods.correction is not None, _CORRECTION),
    "recorded gradients": Fact("`scaffold`", _records, _CORRECTION),
    "server optimiser": Fact("server optimisers", lambda s: s.methods.optimizer is not None, _OPTIMIZER),
    "memory of values": Fact(
        f"what remembers values of the adapter (a lossy wire, {_with('remembers')}, "
        f"{_with('modifies_base_weights')}, `scaffold`)",
        _remembers,
        _what_remembers,
    ),
    "late updates": Fact(
        '`client_selection="resource_aware"`',
        lambda s: SELECTIONS[s.args.client_selection].needs_resources,
        _given("client_selection"),
    ),
    "clock": Fact(
        "`client_resources`",
        lambda s: s.args.client_resources is not None or SELECTIONS[s.args.client_selection].needs_resources,
        _given("client_resources", "client_selection"),
    ),
    "keep_last": Fact(
        '`beyond_capacity="keep_last"`', lambda s: s.args.beyond_capacity == "keep_last", _given("beyond_capacity")
    ),
    "limits of layers": Fact(
        "`client_max_layers`", lambda s: s.args.client_max_layers is not None, _given("client_max_layers")
    ),
    "shares by rows": Fact(
        "methods that weigh all clients by their rows (`c2a`, `dofit`)",
        lambda s: isinstance(s.methods.method, (C2A, DoFIT)),
        _METHOD,
    ),
    "no limits of layers": Fact("no `client_max_layers`", lambda s: s.args.client_max_layers is None),
    # processes and engines
    "network": Fact("clients on other machines", lambda s: s.network),
    "network with anchor transfer": Fact(
        'clients on other machines and `transfer="anchor"`',
        lambda s: s.network and s.args.transfer == "anchor",
        _given("transfer"),
    ),
    "network with growing adapters": Fact(
        "clients on other machines and `adapter_layers`",
        lambda s: s.network and s.args.adapter_layers,
        _given("adapter_layers"),
    ),
    "resuming from the Hub": Fact(
        "`resume_from_hub`", lambda s: s.args.resume_from_hub is not None, _given("resume_from_hub")
    ),
    "label counts": Fact(
        "methods that ask for the clients' label counts (`c2a`, `dofit`)",
        lambda s: isinstance(s.methods.method, (C2A, DoFIT)),
        _METHOD,
    ),
    "pruned ranks": Fact("`hetlora`", lambda s: isinstance(s.methods.method, HetLoRA), _METHOD),
    "secure aggregation": Fact(
        "`secure_aggregation`", lambda s: s.args.secure_aggregation, _given("secure_aggregation")
    ),
    "clients here": Fact("clients that are simulated", lambda s: s.network is False),
    "lossy wire": Fact(
        "a lossy wire",
        _is_lossy,
        _given("wire_dtype", "upload_fraction"),
    ),
    "FedSA-LoRA": Fact("`fedsa_lora`", lambda s: isinstance(s.methods.method, FedSALoRA), _METHOD),
    "not averaged": Fact(
        f"methods that do more than take the mean of what all clients send ({_with('averages', False)})",
        lambda s: not s.methods.method.averages,
        _METHOD,
    ),
    "rule of each value": Fact(
        "`median` and `trimmed_mean`", lambda s: isinstance(s.methods.rule, (Median, TrimmedMean)), _RULE
    ),
    "partial uploads": Fact("`upload_fraction`", lambda s: s.args.upload_fraction < 1, _given("upload_fraction")),
    "robust rule": Fact(
        f"robust rules ({', '.join(f'`{name}`' for name in AGGREGATION_RULES)})",
        lambda s: s.methods.rule is not None,
        _RULE,
    ),
    "differential privacy": Fact(
        "`dp_noise_multiplier` and `dp_target_epsilon`",
        lambda s: s.args.is_private,
        lambda s: ", ".join(
            f"{option}={value}"
            for option in ("dp_noise_multiplier", "dp_target_epsilon")
            if (value := getattr(s.args, option)) is not None
        ),
    ),
    "private clients": Fact(
        'differential privacy for each client (`dp_level="client"`)',
        lambda s: s.args.protects_clients,
        _given("dp_level"),
    ),
    "private records": Fact(
        'differential privacy for each row (`dp_level="record"`)',
        lambda s: s.args.protects_records,
        _given("dp_level"),
    ),
    "accumulated gradients": Fact(
        "`gradient_accumulation_steps` above 1",
        lambda s: s.args.gradient_accumulation_steps > 1,
        _given("gradient_accumulation_steps"),
    ),
    "rows of like length": Fact(
        '`train_sampling_strategy="group_by_length"`',
        lambda s: s.args.train_sampling_strategy == "group_by_length",
        _given("train_sampling_strategy"),
    ),
    "clients by size": Fact(
        '`client_selection="by_size"`', lambda s: s.args.client_selection == "by_size", _given("client_selection")
    ),
    "chosen clients": Fact(
        '`client_selection` other than `"uniform"`',
        lambda s: s.args.client_selection != "uniform",
        _given("client_selection"),
    ),
    "drawn dropouts": Fact(
        "`client_dropout_rate`", lambda s: s.args.client_dropout_rate, _given("client_dropout_rate")
    ),
    "held out rows": Fact(
        "`client_eval_size`", lambda s: s.args.client_eval_size is not None, _given("client_eval_size")
    ),
    "classes": Fact(
        "tasks with classes",
        lambda s: s.args.task is not None and TASKS[s.args.task].classes is not None,
        _given("task"),
    ),
    "DeepSpeed": Fact("DeepSpeed", lambda s: s.args.deepspeed_plugin is not None),
    "Adagrad": Fact('`optim="adagrad"`', lambda s: s.args.optim == "adagrad", _given("optim")),
    "ZeRO-3": Fact("DeepSpeed ZeRO-3", lambda s: s.zero_stage == 3),
    "decay under DeepSpeed": Fact(
        "`weight_decay` under DeepSpeed",
        lambda s: s.args.weight_decay and s.args.deepspeed_plugin is not None,
        lambda s: f"weight_decay={s.args.weight_decay} under DeepSpeed",
    ),
    "FSDP": Fact("FSDP", lambda s: os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"),
    "client_parallel": _placed("client_parallel"),
    "client_parallel processes": _placed("client_parallel", on_several=True),
    "data_parallel": _placed("data_parallel"),
    "shared batches": _placed("data_parallel", on_several=True),
    "processes in step": Fact(
        '`client_placement="data_parallel"` on several processes, or DeepSpeed',
        lambda s: (
            s.args.client_placement == "data_parallel"
            and (s.args.world_size > 1 or s.args.deepspeed_plugin is not None)
        ),
        _given("client_placement"),
    ),
    "several processes": Fact("several processes", lambda s: s.args.world_size > 1),
    "smaller batches": Fact(
        "`auto_find_batch_size`", lambda s: s.args.auto_find_batch_size, _given("auto_find_batch_size")
    ),
    "automatic checkpointing": Fact(
        "`auto_activation_checkpointing`",
        lambda s: s.args.auto_activation_checkpointing,
        _given("auto_activation_checkpointing"),
    ),
    "mixed precision in fp16": Fact("mixed precision in fp16", lambda s: s.mixed_precision == "fp16"),
    "mean over rows": Fact("a loss that is no mean over all tokens of a batch", lambda s: s.mean_over_tokens is False),
    "own optimizer": Fact(
        "a DeepSpeed config with an optimizer of its own", lambda s: "optimizer" in _deepspeed_config(s)
    ),
    "own scheduler": Fact(
        "a DeepSpeed config with a scheduler of its own", lambda s: "scheduler" in _deepspeed_config(s)
    ),
    # trainers and evaluation
    "stages": Fact("DevFT's rounds", lambda s: True),
    "TRL": Fact("`--trainer sft` and `dpo`", lambda s: s.trainer != "devft", _trainer),
    "DPO": Fact("`--trainer dpo`", lambda s: s.trainer == "dpo", _trainer),
    "generated answers": Fact(
        "`predict_with_generate`", lambda s: s.args.predict_with_generate, _given("predict_with_generate")
    ),
    "no prompts": Fact(
        "a task other than text-generation", lambda s: not answers_prompts(s.args.task), _given("task")
    ),
    "nothing to evaluate": Fact(
        "no `eval_dataset` or no `processing_class`", lambda s: s.has_evaluation is False or s.has_processor is False
    ),
}


def _deepspeed_config(setup: Setup) -> dict:
    plugin = setup.args.deepspeed_plugin
    return {} if plugin is None else plugin.deepspeed_config
