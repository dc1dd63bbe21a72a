"""What a run leaves behind: a directory in our own format, with what was trained and with nothing twice."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from blip2 import weights
from blip2.config import Blip2Config, PartConfig
from blip2.errors import CheckpointError
from blip2.model.bridge import Bridge
from blip2.train.lora import Adapter
from blip2.train.start import Start, base_of
from blip2.weights import adapter


@dataclass(frozen=True)
class Outcome:
    """The parts of a model that was trained; call it with the directory that it is to lie in.

    Attributes:
        start: what training began from: what is not saved stays there, and its own adapter comes along.
        digest: SHA-256 of a named part's files.
        vision: the image encoder where it is saved with the model.
        lora: the adapter that was trained.
        vocabulary: int64[K], sorted: the tokens that the bridge was trained to write, all where None.
    """

    config: Blip2Config
    start: Start | None
    digest: Callable[[PartConfig], str]
    bridge: Bridge
    vision: nn.Module | None
    lora: Adapter | None
    vocabulary: Tensor | None

    def __call__(self, directory: Path) -> None:
        """Write it.

        Raises:
            CheckpointError: it cannot be written (a full disk, say).
        """
        parts = {
            key: dataclasses.replace(part, sha256=self.digest(part))
            for key in ("vision", "text", "language")
            if isinstance(part := getattr(self.config, key), PartConfig)
        }
        config = self.config.replace(
            plain_texts=True,  # as training reads them
            base=base_of(self.start, vision_saved=self.vision is not None),
            adapter=self._save_adapter(directory / adapter.FOLDER),
            **parts,
        )
        weights.save(directory, config, self.bridge, self.vision, vocabulary=self.vocabulary)

    def _save_adapter(self, folder: Path) -> int:
        """The trained adapter, or the one of the start; how many layers it changes."""
        try:
            if self.lora is not None:
                self.lora.save(folder)
                return len(self.lora.changed)
            if self.start is None or not self.start.config.adapter or self.config.language is None:
                return 0
            shutil.copytree(self.start.directory / adapter.FOLDER, folder, dirs_exist_ok=True)
            return self.start.config.adapter
        except OSError as error:
            raise CheckpointError(f"{folder}: the adapter cannot be written: {error}; free some space") from error
