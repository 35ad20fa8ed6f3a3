"""What cannot go together, in one table: options, methods, adapters, models and engines.

`CONFLICTS` has a row for each pair, with what to change; `FACTS` says how to tell that a run has either of them. A
config, a trainer and a plan all ask `check_compatibility`, each with what it knows, and docs/compatibility.md is made
from the table.
"""

from hf_devft.configuration.facts import FACTS, Setup


_ANCHORS = 'set fusion="anchor", adapter_fusion="anchor" and transfer="anchor"'
_OUTPUT_ONLY = "it asks the server's own texts, of which TRL prepares none: leave it out"
_WHOLE_SUBMODEL = "no process has a whole submodel: use ZeRO-2"
_BOTH_TEACHINGS = (
    ("one stage", "there is nothing to teach: leave it out"),
    ("no texts", "it asks texts of the server's own: pass `calibration_dataset`, one dataset that is not empty"),
    ("no labels", "they must say where a prompt ends: give `labels`, -100 in it"),
    ("no tokenizer", "it generates answers: pass `processing_class`"),
    ("no room for prompts", "prompt and answer must fit into max_length: lower generation_max_new_tokens"),
    ("encoder and decoder", "a decoder reads answers, which are not known: leave it out"),
    ("mixed precision in fp16", "small gradients are lost, which nothing scales there: use bf16"),
    ("ZeRO-3", _WHOLE_SUBMODEL),
    ("TRL", _OUTPUT_ONLY),
)

_UNEVEN = (
    "a batch is cut in uneven parts: use a model that takes `num_items_in_batch`, pass `compute_loss_func`, or set "
    "`loss_is_scaled_for_ga = True` in a trainer whose own `compute_loss` divides by that"
)

# (one fact, another, why, and what to change). The first that a run has is what it is refused for.
CONFLICTS: list[tuple[str, str, str]] = [
    ("DPO", "several processes", "a batch of pairs cannot be cut: use one process"),
    ("DPO", "data_parallel", "a batch of pairs cannot be cut: use one process"),
    ("DPO", "smaller batches", "a batch of pairs cannot be cut: leave it out"),
    ("automatic checkpointing", "DPO", "what pairs take is not planned: set activation_checkpointing"),
    ("automatic checkpointing", "no tokens", "what its inputs take is not planned: set activation_checkpointing"),
    ("automatic checkpointing", "ZeRO-3", "what a process holds is not planned: set activation_checkpointing"),
    ("DPO", "changed base", "the base is its reference, and must stay: use another method"),
    ("DPO", "moved weights", "no reference is left where the adapter is taken off: use another initialisation"),
    ("DPO", "generated answers", "it compares with one answer, and pairs have two: turn it off"),
    ("TRL", "temporary head", "its losses read the weights of the head, not its adapter: leave it out"),
    ("TRL", "calibrated", "it measures the loss of text, which TRL prepares: use another rule"),
    ("TRL", "client_parallel processes", 'all add up metrics in every step: set client_placement="data_parallel"'),
    ("stages", "FSDP", "shard with DeepSpeed ZeRO-3 (recipes/accelerate/zero3.yaml)"),
    ("prefix", "rules that are not anchors", f"the layers above neither give nor receive: {_ANCHORS}"),
    *(("healing", other, why) for other, why in _BOTH_TEACHINGS),
    ("healing", "no language model", "only the next tokens say enough of a text: leave it out"),
    ("healing", "weights that cannot be trained", "it trains all weights of the layers: load the base unquantised"),
    ("healing", "base in fp16", "small gradients are lost: load the base in bfloat16 or float32"),
    *(("distillation", other, why) for other, why in _BOTH_TEACHINGS),
    ("distillation", "no classes", "it compares what a model says of classes of which one is right: leave it out"),
    ("distillation", "fixed adapter", "it changes the adapter: leave one out"),
    ("distillation", "split", 'no layer gets back what it learned from: set transfer="broadcast" or "anchor"'),
    ("distillation", "temporary head", "the head is dropped before its stage could be asked: leave it out"),
    ("adapter stages", "submodels", "all layers compute in every stage: leave one out"),
    ("adapter stages", "bridges", "no layer is left out: leave one out"),
    ("adapter stages", "healing", "no layer is left out: leave one out"),
    ("adapter stages", "distillation", "nothing is lost where layers get an adapter: leave one out"),
    ("adapter stages", "temporary head", "every stage has the head as it is: leave one out"),
    ("adapter stages", "chosen layers", "both say which layers have an adapter: leave one out"),
    ("adapter stages", "adapted experts", "PEFT chooses layers only of modules: leave one out"),
    ("adapter stages", "pattern of modules", "PEFT chooses layers only of modules by name: use names"),
    ("adapter stages", "encoder and decoder", "PEFT numbers the layers of both alike: use stages of submodels"),
    ("adapter stages", "modules outside of layers", "they have no layer's number: leave them out of `target_modules`"),
    ("adapter stages", "changed base", "it changes layers that have no adapter yet: use another method"),
    ("adapter stages", "no LoRA factors", "PEFT chooses layers of LoRA alone: use a `LoraConfig`"),
    (
        "adapter stages",
        "trained start",
        "layers that come later would lose what they have: use a base that it is merged into",
    ),
    ("adapter stages", "moved weights", "every module needs its adapter: use another initialisation"),
    ("bridges", "no bridges", 'it chooses what bridges stand for: set fusion="bridge"'),
    ("bridges", "scattered groups", 'a bridge stands for layers that follow one another: set grouping="bridged"'),
    ("bridges", "more than anchors receive", 'layers that are bridged keep what they have: set transfer="anchor"'),
    ("bridges", "one stage", "nothing is left out: leave it out"),
    ("bridges", "no texts", "they are fitted on texts of the server's own: pass `calibration_dataset`"),
    ("bridges", "encoder and decoder", "a decoder reads answers, which are not known: use another fusion"),
    (
        "groups by kind",
        "several kinds of layers",
        'only "bridged" groups follow one another there: set grouping="bridged"',
    ),
    ("bridges", "ZeRO-3", "no process has the whole base: use ZeRO-2"),
    ("bridges", "TRL", _OUTPUT_ONLY),
    ("calibrated", "no calibration texts", "it measures losses on calibration texts: pass `calibration_dataset`"),
    ("calibrated", "ZeRO-3", "it measures many submodels, which are whole nowhere: group otherwise, or use ZeRO-2"),
    ("DoRA", "fused layers", 'it keeps norms of a layer\'s own weights: set fusion="anchor", adapter_fusion="anchor"'),
    ("DoRA", "healing", "it keeps norms of weights that healing changes: leave healing_steps out"),
    (
        "orthogonal start",
        "fused adapters",
        "factors of different layers are not orthogonal, so that a stage would start from noise: set "
        'adapter_fusion="anchor"',
    ),
    ("orthogonal start", "own ranks", "a part of its ranks is not orthogonal, but noise: use another method"),
    ("orthogonal start", "lossy wire", "rounded factors are not orthogonal: use another initialisation"),
    ("split", "no LoRA factors", 'there is no B to divide: set transfer="broadcast" or "anchor"'),
    ("IA3", "quantised base", "PEFT cannot take it off again: use a `LoraConfig`"),
    ("moved weights", "rules that are not anchors", f"an adapter holds a part of its own layer's weights: {_ANCHORS}"),
    ("moved weights", "calibrated", "every module needs its adapter: group by another rule"),
    ("moved weights", "temporary head", "every module needs its adapter: leave it out"),
    ("moved weights", "uneven adapter", "it is saved as plain LoRA of one rank: leave these out"),
    ("moved weights", "quantised base", "it changes the base's weights: use a base that is not quantised"),
    ("moved weights", "ZeRO-3", "it changes the base's weights, which are not whole: use ZeRO-2"),
    ("temporary head", "no head", "it adapts these: leave it out"),
    ("temporary head", "adapted head", "it has an adapter already: leave one out"),
    ("temporary head", "memory of values", "some of them are dropped with the head: leave one out"),
    ("chosen layers", "two stacks", "it numbers the layers of one stack: choose that by `stack`"),
    (
        "chosen layers",
        "adapted layers elsewhere",
        "they are numbered otherwise in a submodel: set the LoraConfig's layers_pattern to what the stack's are "
        'called, such as "decoder.layers"',
    ),
    ("chosen layers", "adapted experts", "PEFT chooses layers only of modules: leave one out"),
    ("factors", "no LoRA factors", "use a `LoraConfig`, or another method"),
    ("products", "no LoRA factors", "use a `LoraConfig`, or another method"),
    ("products", "uneven adapter", "it needs one rank and scale everywhere: leave these out"),
    ("products", "moved weights", "products hold a part of the weights: use another initialisation"),
    ("changed base", "anchor transfer", 'what other layers have is dropped: set transfer="broadcast" or "split"'),
    (
        "own values",
        "anchors that come and go",
        'layers that are no anchors for a stage would lose theirs: set transfer="broadcast" or grouping="prefix"',
    ),
    ("changed base", "quantised base", "it adds to the weights: use a base that is not quantised"),
    ("changed base", "ZeRO-3", "it adds to the weights, which are not whole: use ZeRO-2"),
    ("changed base", "adapted embeddings", "it cannot add to embeddings: leave them out of `target_modules`"),
    ("FLoRA", "trained start", "every client starts from a new one: use a base that it is merged into"),
    ("FLoRA", "chosen start", "every client starts from a new A, which it draws itself: leave it out"),
    ("FFA-LoRA", "adapted embeddings", "it freezes A, which is zero there: leave them out of `target_modules`"),
    ("DropPEFT", "not one stack of tokens", "it leaves out layers of one stack that tokens go through: use another"),
    ("recorded gradients", "not FedIT", "it corrects the gradients of all that travels: join it with fedit"),
    (
        "recorded gradients",
        "smaller batches",
        "it adds up gradients, also of steps taken again: leave one out",
    ),
    (
        "recorded gradients",
        "limits of layers",
        "gradients of clients that sit out would correct the others' for good: leave one out",
    ),
    ("shares by rows", "clients by size", "chances have the rows already: leave one out"),
    ("recorded gradients", "clients by size", "it would weigh gradients and adapters otherwise: leave one out"),
    ("server optimiser", "not optimisable", "it steps from one round's adapter to the next: leave one out"),
    ("late updates", "no late updates", "none can come late: use another `client_selection`, or method"),
    ("clock", "encoder and decoder", "a round's length is known of one stack of layers: leave it out"),
    ("parts in turns", "decay under DeepSpeed", "parts that are frozen would decay: set weight_decay=0"),
    (
        "keep_last",
        "transfer but broadcast",
        'what a smaller submodel learns goes to all layers of a group: set transfer="broadcast"',
    ),
    ("keep_last", "DoRA", "norms of other layers' weights would be added up: leave it out"),
    ("keep_last", "not FedIT", 'it takes updates of other depths: use "fedit", or beyond_capacity="sit_out"'),
    ("keep_last", "correction", 'it takes updates of other depths: leave it out, or set beyond_capacity="sit_out"'),
    ("keep_last", "temporary head", 'it takes updates of other depths: leave it out, or set "sit_out"'),
    ("keep_last", "DeepSpeed", 'it trains two submodels in turns, each on one process: set "sit_out"'),
    ("keep_last", "shared batches", 'it trains two submodels in turns, each on one process: set "sit_out"'),
    ("keep_last", "no limits of layers", "every client can hold every stage: give client_max_layers, or leave it out"),
    ("network", "changed base", "the server would have to send all changes of the weights: use another method"),
    ("network", "label counts", "they stay with the clients: use another method"),
    ("network", "pruned ranks", "the server would have to know which ranks clients prune: use flexlora or hlora"),
    (
        "network",
        "resuming from the Hub",
        "clients keep what is of a run whose number is never pushed: use resume_from_checkpoint",
    ),
    ("network", "moved weights", "each client would have to move them alike: use another initialisation"),
    ("network", "clock", "clients take the time they take: leave it out"),
    ("network", "drawn dropouts", "clients drop out by themselves: leave it out"),
    ("network", "held out rows", "their rows stay with the clients: pass an `eval_dataset` of the server's own"),
    ("network", "keep_last", 'a client holds one submodel: set beyond_capacity="sit_out"'),
    ("network", "several processes", "the server waits for its clients in one process: leave the others out"),
    ("network", "TRL", "clients train as DevFTTrainer does: leave it out"),
    ("network", "classes", "clients would have to agree on the labels: use a task without"),
    ("secure aggregation", "clients here", "nothing is sent: leave it out"),
    (
        "secure aggregation",
        "lossy wire",
        'it adds up fixed-point numbers: set wire_dtype="fp32" and upload_fraction=1',
    ),
    ("secure aggregation", "products", "these need each client's own factors: use another method"),
    ("secure aggregation", "DropPEFT", "clients send different layers, which cannot be added up: use another"),
    ("secure aggregation", "recorded gradients", "only the updates are added up: leave it out"),
    (
        "FedSA-LoRA",
        "network with anchor transfer",
        'a client does not know what other layers have: set transfer="broadcast"',
    ),
    (
        "FedSA-LoRA",
        "network with growing adapters",
        "a client does not know what layers have that come later: use another method",
    ),
    ("robust rule", "not averaged", "it needs updates that stand for the same: use fedit, ffa_lora or rolora"),
    ("rule of each value", "partial uploads", "what most clients leave out counts as nothing: set it to 1"),
    ("robust rule", "recorded gradients", "what it sends beside the update would go unwatched: leave it out"),
    ("robust rule", "late updates", "it looks at all of a round's updates at once: use another `client_selection`"),
    ("robust rule", "secure aggregation", "it looks at each client's update: leave one out"),
    (
        "private clients",
        "not averaged",
        "it adds noise to a mean of updates: use ffa_lora, fedit or rolora",
    ),
    (
        "private clients",
        "FedSA-LoRA",
        "what stays with clients is published without noise: use ffa_lora, fedit or rolora",
    ),
    ("private clients", "robust rule", "its noise is made for a mean: leave one out"),
    ("private clients", "secure aggregation", "the server clips each client's update: leave one out"),
    ("private clients", "clock", "how long a round takes tells of its clients: leave it out"),
    ("private records", "clock", "how long a client takes tells of its rows: leave it out"),
    ("private records", "network", 'what clients say of their training has no noise: set dp_level="client"'),
    ("private records", "TRL", "its batches cannot be cut into rows: leave it out"),
    ("private records", "label counts", "they have no noise: use another method"),
    ("private records", "correction", "it corrects gradients behind the noise: leave it out"),
    ("private records", "own ranks", "noise falls on ranks that a client does not have: use another method"),
    ("private records", "accumulated gradients", "chance draws each step's rows at once: set it to 1"),
    ("private records", "rows of like length", 'chance draws the rows: set train_sampling_strategy="random"'),
    ("private records", "smaller batches", "each row goes through the model alone already: leave it out"),
    ("private records", "mixed precision in fp16", "scaled gradients cannot be clipped: use bf16"),
    ("private records", "DeepSpeed", "it keeps gradients to itself: leave it out"),
    ("private records", "shared batches", 'each row is seen by one process: set client_placement="client_parallel"'),
    ("differential privacy", "recorded gradients", "it sends gradients without noise: leave it out"),
    ("differential privacy", "chosen clients", 'accounting needs equal chances: set client_selection="uniform"'),
    ("differential privacy", "held out rows", "metrics of clients' rows have no noise: pass an `eval_dataset`"),
    ("DeepSpeed", "client_parallel", 'it trains each client on all processes: set client_placement="data_parallel"'),
    (
        "DeepSpeed",
        "Adagrad",
        "it has sums before its first step, which are not made anew for each client: use another",
    ),
    ("DeepSpeed", "own optimizer", "each client starts a fresh one: leave it out, and set `optim`"),
    ("DeepSpeed", "own scheduler", "a schedule counts rounds: leave it out, and set `lr_scheduler_type`"),
    (
        "smaller batches",
        "processes in step",
        "processes run out of memory one by one: lower `per_device_train_batch_size` and raise "
        "`gradient_accumulation_steps`",
    ),
    ("smaller batches", "mean over rows", _UNEVEN),
    ("shared batches", "mean over rows", _UNEVEN),
    ("generated answers", "no prompts", "only causal language models answer prompts: turn it off"),
    (
        "generated answers",
        "nothing to evaluate",
        "it answers evaluation rows: pass both",
    ),
]


def check_compatibility(setup: Setup) -> None:
    """Refuse what cannot go together, as far as it is known.

    Raises:
        ValueError: the first of `CONFLICTS` that the run has, in one line.
    """
    for one, other, why in CONFLICTS:
        if FACTS[one].holds(setup) and FACTS[other].holds(setup):
            raise ValueError(f"{FACTS[one].describe(setup)} cannot go with {FACTS[other].describe(setup)}: {why}.")
