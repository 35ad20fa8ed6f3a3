"""What the user says of what a run writes, and of what it goes on from."""

from dataclasses import dataclass, field


@dataclass
class OutputOptions:
    """
    What a run writes and goes on from: options of `DevFTConfig`.

    > Parameters that control what is written

        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Delete the stages and checkpoints of another run in `output_dir`, beside which none is started.
        baseline (`str`, *optional*):
            Folder of another finished run, of FedIT say, whose loss at full depth is drawn beside this one's.
        resume_from_hub (`str`, *optional*):
            Repository that an earlier run has pushed to: go on with the stage after its last one.
        card_license (`str`, *optional*):
            Metadata of the model card: licence of the adapter.
        card_language (`list[str]`, *optional*):
            Metadata of the model card: languages (ISO 639-1).
        card_datasets (`list[str]`, *optional*):
            Metadata of the model card: names of the datasets on the Hub.
    """

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete what another run has left in output_dir."}
    )
    baseline: str | None = field(
        default=None, metadata={"help": "Folder of a finished run whose loss the plot shows, too."}
    )
    resume_from_hub: str | None = field(
        default=None, metadata={"help": "Repository of an earlier run: go on with the stage after its last one."}
    )
    card_license: str | None = field(default=None, metadata={"help": "Model card: licence of the adapter."})
    card_language: list[str] | None = field(default=None, metadata={"help": "Model card: languages, ISO 639-1."})
    card_datasets: list[str] | None = field(default=None, metadata={"help": "Model card: datasets on the Hub."})
