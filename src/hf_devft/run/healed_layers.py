"""Where a run keeps the layers that it has healed, and its bridges, so that it makes each submodel once."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from hf_devft.configuration import StageConfig
from hf_devft.configuration.stage_folder import SUBMODEL
from hf_devft.files import check_whole, link_whole
from hf_devft.models.layer_files import healed_path


class HealedLayers:
    """The files of the healed layers of a run's stages.

    Checkpoints and finished stages have what they need of them in their `submodel/`.

    Args:
        output_dir: of the run.
        stages: all of them.
        earlier: whether clients that can hold no more train the submodels of earlier stages.
        is_main: whether this is the process that writes.
    """

    def __init__(self, output_dir: str | Path, stages: Sequence[StageConfig], earlier: bool, is_main: bool = True):
        self._folder, self._stages = Path(output_dir, ".healed"), stages
        self._earlier, self._is_main = earlier, is_main

    def path(self, stage: int) -> Path:
        """Return where a stage's healed layers are kept."""
        return healed_path(self._folder, stage)

    def needed_by(self, stage: int) -> list[int]:
        """List the stages whose healed layers a run needs to go on within `stage` or after it: its own, and those that
        clients train who can hold no more."""
        first = 1 if self._earlier else stage
        return [record.stage for record in self._stages[first - 1 : stage] if record.is_taught]

    def copy_into(self, folder: Path, stage: int) -> None:
        """Link what `stage` needs into a folder of its compact adapter."""
        for needed in self.needed_by(stage):
            link_whole(self.path(needed), healed_path(folder, needed))

    def take_from(self, folder: str | Path, stage: int) -> None:
        """Take over what `stage` needs from a checkpoint, or from a finished stage's folder.

        Raises:
            ValueError: it is not there.
        """
        for needed in self.needed_by(stage):
            places = (Path(folder, SUBMODEL), Path(folder, f"stage-{needed}", SUBMODEL))
            paths = [path for place in places if (path := healed_path(place, needed)).exists()]
            if not paths:
                raise ValueError(
                    f"{folder} lacks the healed layers or bridges of stage {needed}, {healed_path(SUBMODEL, needed)}: "
                    "give the whole folder, as the run has left it."
                )
            check_whole(paths[0])
            if self._is_main:
                link_whole(paths[0], self.path(needed))

    def delete(self) -> None:
        """Delete what an earlier run has left here."""
        if self._is_main:
            shutil.rmtree(self._folder, ignore_errors=True)
