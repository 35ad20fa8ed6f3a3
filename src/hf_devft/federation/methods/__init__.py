"""Federated methods: what travels and how it is combined. One file each, one line here.

To add one of your own: `METHODS["mine"] = MyMethod`, see examples/own_method.py.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from hf_devft.federation.methods.base import Clients, FederatedMethod
from hf_devft.federation.methods.c2a import C2A
from hf_devft.federation.methods.correction import LocalCorrection
from hf_devft.federation.methods.dofit import DoFIT
from hf_devft.federation.methods.droppeft import DropPEFT
from hf_devft.federation.methods.fedex_lora import FedExLoRA
from hf_devft.federation.methods.fedit import FedIT
from hf_devft.federation.methods.fedprox import FedProx
from hf_devft.federation.methods.fedsa_lora import FedSALoRA
from hf_devft.federation.methods.ffa_lora import FFALoRA
from hf_devft.federation.methods.flexlora import FlexLoRA, HLoRA
from hf_devft.federation.methods.flora import FLoRA
from hf_devft.federation.methods.heterogeneous import HeterogeneousRanks
from hf_devft.federation.methods.hetlora import HetLoRA
from hf_devft.federation.methods.residual import Residual
from hf_devft.federation.methods.robust import AGGREGATION_RULES, AggregationRule
from hf_devft.federation.methods.rolora import RoLoRA
from hf_devft.federation.methods.scaffold import Scaffold
from hf_devft.federation.methods.server_optimizers import SERVER_OPTIMIZERS, ServerOptimizer


METHODS: dict[str, type[FederatedMethod]] = {
    "fedit": FedIT,
    "ffa_lora": FFALoRA,
    "fedsa_lora": FedSALoRA,
    "rolora": RoLoRA,
    "flora": FLoRA,
    "fedex_lora": FedExLoRA,
    "flexlora": FlexLoRA,
    "hlora": HLoRA,
    "hetlora": HetLoRA,
    "c2a": C2A,
    "dofit": DoFIT,
    "droppeft": DropPEFT,
}
CORRECTIONS: dict[str, type[LocalCorrection]] = {"fedprox": FedProx, "scaffold": Scaffold}


class Methods(NamedTuple):
    """What a `federated_method` names."""

    method: FederatedMethod
    correction: LocalCorrection | None
    optimizer: ServerOptimizer | None
    rule: AggregationRule | None


def make_methods(name: str, options: dict[str, Any] | None = None) -> Methods:
    """Make what a `federated_method` names.

    Args:
        name: a name in `METHODS`, `CORRECTIONS`, `SERVER_OPTIMIZERS` or `AGGREGATION_RULES`, or one of each joined by
            "+"; "fedit" is the method where none is named.
        options: arguments of what is named.

    Raises:
        ValueError: unknown or doubled names, one that stands for two things, options that nothing takes or that are
            refused.
    """
    registries: dict[str, dict[str, Any]] = {
        "method": METHODS,
        "correction": CORRECTIONS,
        "server optimiser": SERVER_OPTIMIZERS,
        "aggregation rule": AGGREGATION_RULES,
    }
    chosen: dict[str, Callable[..., Any] | None] = dict.fromkeys(registries)
    for part in name.split("+"):
        kinds = [kind for kind, registry in registries.items() if part in registry]
        if len(kinds) > 1:
            raise ValueError(
                f"federated_method={name!r}: {part!r} is registered as {' and as '.join(kinds)}. Register yours by "
                "another name."
            )
        if not kinds:
            known = "; ".join(f"{kind}s: {', '.join(registry)}" for kind, registry in registries.items())
            raise ValueError(
                f"federated_method={name!r}: {part!r} is unknown ({known}). Join them by '+'; "
                "fedit is FedAvg of the adapters."
            )
        kind = kinds[0]
        if chosen[kind] is not None:
            raise ValueError(f"federated_method={name!r} names two {kind}s: leave one.")
        chosen[kind] = registries[kind][part]
    chosen["method"] = chosen["method"] or FedIT
    takes: dict[str, set[str]] = {
        kind: set(inspect.signature(made).parameters) if made else set() for kind, made in chosen.items()
    }
    known_options: set[str] = set().union(*takes.values())
    if unknown := set(options or {}) - known_options:
        raise ValueError(
            f"federated_method_kwargs has {sorted(unknown)}, which {name!r} does not take: "
            f"it takes {sorted(known_options) or 'none'}."
        )
    made = (
        make
        and make(**{key: _as_typed(make, key, value) for key, value in (options or {}).items() if key in takes[kind]})
        for kind, make in chosen.items()
    )
    return Methods(*made)


def _as_typed(make: Callable[..., Any], option: str, value: Any) -> Any:
    """What an option means, of its annotated type: YAML reads 1e-3 as text.

    Raises:
        ValueError: it is of another type, or no finite number.
    """
    annotation = inspect.signature(make).parameters[option].annotation
    try:
        return TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False)).validate_python(value)
    except PydanticUserError:  # an annotation of one's own, or none
        return value
    except ValidationError as error:
        raise ValueError(f"federated_method_kwargs: {option}={value!r}: {error.errors()[0]['msg']}.") from error


__all__ = [
    "AGGREGATION_RULES",
    "C2A",
    "CORRECTIONS",
    "METHODS",
    "SERVER_OPTIMIZERS",
    "AggregationRule",
    "Clients",
    "FederatedMethod",
    "HeterogeneousRanks",
    "LocalCorrection",
    "Methods",
    "Residual",
    "ServerOptimizer",
    "make_methods",
]
