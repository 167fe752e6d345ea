"""The model as it was before RL: what the KL term measures against, and what verifies demonstrations cautiously."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from toolx_kernels.engine import RolloutEngine
from toolx_kernels.models.adapters import freeze_adapter, has_adapter, reference_adapter
from toolx_kernels.rollout.rollout import Rollouter
from toolx_kernels.train.run.checkpoint import load_weights


class ReferenceModel:
    """The model of ``checkpoint``: a copy of ``model`` or, where an adapter is trained, a second one on its weights.

    Raises:
        InputError: the checkpoint cannot be read, or is of another model.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: Path):
        self._is_adapter = has_adapter(model)
        if self._is_adapter:
            freeze_adapter(model, checkpoint)
            self.model = model
        else:
            self.model = copy.deepcopy(model).requires_grad_(False)
            load_weights(checkpoint, self.model)

    @contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        """Inside, the model that comes is the one before RL."""
        if self._is_adapter:
            with reference_adapter(self.model):
                yield self.model
        else:
            yield self.model


@dataclass(slots=True)
class ReferenceRollouter:
    """Runs ``rollouter``, which has its own engine, on the reference model."""

    frozen: ReferenceModel
    rollouter: Rollouter

    @property
    def engine(self) -> RolloutEngine:
        return self.rollouter.engine

    def roll_out(self, *args, **options):
        with self.frozen.active():
            return self.rollouter.roll_out(*args, **options)
