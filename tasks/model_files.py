"""The files of a registered model, named so that work on any machine finds them.

Apart from `tasks/models.py` because jobs that carry such names are read on Ray workers, where
MLflow takes seconds to import and is only needed once the files are.
"""

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path


class OtherWeightsError(RuntimeError):
    """A reference stands for other weights than when it was resolved."""


@dataclass(frozen=True)
class ModelFiles:
    """One version in a registry; picklable.

    reference: NAME/VERSION. weights: SHA-256 of its averaged weights, in hex; tells models apart
    where a reference alone does not, as after a registry was made anew. uri: of the registry.
    """

    reference: str
    weights: str
    uri: str

    def folder(self) -> Path:
        """Return the folder with the files, fetched once a machine.

        Those of a local store are used where they are. Raises OtherWeightsError where the
        reference has come to stand for another model.
        """
        from tasks import tracking

        cache = Path(tempfile.gettempdir()) / f"gigashape-models-{os.getuid()}" / self.weights
        folder = tracking.download_model(self.reference, self.uri, cache)
        found = json.loads((folder / "state.json").read_text())["files"]["ema.safetensors"]
        if found != self.weights:
            raise OtherWeightsError(
                f"{self.reference} in {self.uri} has the weights {found}, not {self.weights}: its "
                f"registry was made anew meanwhile; start again (files in {folder})"
            )
        return folder
