"""The federation that a config asks for."""

from typing import Any

from hf_devft.configuration import DevFTConfig
from hf_devft.federation.heterogeneity.label_features import label_counts
from hf_devft.federation.heterogeneity.resources import ClientResources, load_resources, make_resources
from hf_devft.federation.memory import Memory
from hf_devft.federation.methods import Clients, make_methods
from hf_devft.federation.privacy import Accountant, ClientPrivacy, PoissonSampling
from hf_devft.federation.processes import add_up, gather
from hf_devft.federation.rounds import Federation
from hf_devft.federation.selection import SELECTIONS, ClientSelection
from hf_devft.federation.wire import Wire
from hf_devft.run.checkpoint import Checkpoint
from hf_devft.trainer.interface import FederatedTrainer


def build_federation(
    trainer: FederatedTrainer,
    checkpoint: Checkpoint | None = None,
    accountant: Accountant | None = None,
    secret: int = 0,
) -> Federation:
    """Build the federation of all rounds to come of a trainer's clients.

    Args:
        checkpoint: from which a run goes on.
        accountant, secret: of a run that is differentially private; see `read_secret`.

    Raises:
        ValueError: options of the selection or resources that are refused; a method that refuses the clients.
    """
    args, clients = trainer.args, trainer.clients
    memory = Memory()
    if checkpoint is not None:
        memory.load_state_dict(checkpoint.run.federation)
    examples = clients.examples
    method, correction, optimizer, rule = make_methods(args.federated_method, args.federated_method_kwargs)
    # Of a private run all clients have weight 1, so that nobody's number of examples shows; and where those with more
    # are asked more often, which is their weight.
    is_weighted = accountant is None and args.client_selection != "by_size"
    weights = examples if is_weighted else [1] * len(examples)
    rows: list[Any] = list(clients.rows.values())
    taking_part = Clients(
        examples=weights,
        seed=args.seed,
        label_counts=lambda: label_counts(trainer.train_dataset, rows),
        memory=memory,
    )
    method.begin_run(taking_part)
    if correction is not None:
        correction.begin_run(taking_part)
    # Who takes part is a secret where that makes clients private.
    selection = build_selection(args, examples, clients.names, secret if args.protects_clients else args.seed)
    privacy = None
    if accountant is not None and args.dp_clipping_norm is not None and args.protects_clients:
        expected = args.clients_per_round
        privacy = ClientPrivacy(accountant.noise_multiplier, args.dp_clipping_norm, expected, secret, memory)
    return Federation(
        method=method,
        correction=correction,
        optimizer=optimizer,
        wire=Wire(args.wire_dtype, args.upload_fraction, memory),
        memory=memory,
        selection=selection,
        placement=trainer.placement,
        names=clients.names,
        quorum=args.round_quorum,
        retries=args.round_retries if accountant is None else 0,  # each attempt would cost
        add_up=add_up,
        gather=gather,
        device=args.device,
        rule=rule,
        privacy=privacy,
        is_private=accountant is not None,
        sees_sums_only=args.secure_aggregation,
    )


def build_selection(args: DevFTConfig, examples: list[int], names: list[str], seed: int) -> ClientSelection:
    """Build the selection of clients, with their resources where a clock is asked for.

    Args:
        seed: what clients are drawn by.
    """
    try:
        selection = (
            PoissonSampling(**args.client_selection_kwargs or {})
            if args.protects_clients and args.dp_sampling == "poisson"
            else SELECTIONS[args.client_selection](**args.client_selection_kwargs or {})
        )
    except TypeError as error:
        raise ValueError(f"client_selection_kwargs={args.client_selection_kwargs}: {error}") from error
    resources: list[ClientResources] | None = None
    if args.client_resources == "simulated" or (selection.needs_resources and args.client_resources is None):
        resources = make_resources(len(examples), args.seed)
    elif args.client_resources is not None:
        resources = load_resources(args.client_resources, names)
    if args.round_quorum > (most := selection.most_in_time(args.clients_per_round)):
        raise ValueError(
            f"round_quorum={args.round_quorum} is more than the {most} answers for which client_selection="
            f"{args.client_selection!r} waits, so that rounds would be tried again with others: lower it, or "
            "raise `wait_for`."
        )
    selection.begin_run(args.clients_per_round, examples, args.client_dropout_rate, seed, resources)
    return selection


def gradient_obstacle(args: DevFTConfig, federation: Federation) -> str | None:
    """Why the method needs each client's own gradients, so that clients cannot share a batch; or None."""
    if federation.method.corrects or federation.correction is not None:
        return f"federated_method={args.federated_method!r} looks at each client's gradients"
    return 'dp_level="record" looks at each row\'s gradient' if args.protects_records else None
