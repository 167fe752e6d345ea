"""The reference model: the model before RL, used by the KL term and by cautious verification of demonstrations."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from toolx_kernels.models.adapters import drop_frozen_adapter, freeze_adapter, has_adapter, reference_adapter
from toolx_kernels.rollout.rollout import Rollout, Rollouter
from toolx_kernels.toolcall.rows import Row
from toolx_kernels.train.run.checkpoint import load_weights


class ReferenceModel:
    """The model of ``checkpoint``: a copy of ``model`` or, if an adapter is trained, a second adapter on its weights.

    Raises:
        InputError: the checkpoint cannot be read, or belongs to another model.
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
        """Context that yields the model before RL."""
        if self._is_adapter:
            with reference_adapter(self.model):
                yield self.model
        else:
            yield self.model

    def close(self) -> None:
        """Removes the second adapter again, if there is one."""
        if self._is_adapter:
            drop_frozen_adapter(self.model)


class ReferenceRollouter:
    """Runs ``rollouter``, which has its own engine, on the reference model."""

    def __init__(self, reference: ReferenceModel, rollouter: Rollouter):
        self.reference, self.rollouter, self.engine = reference, rollouter, rollouter.engine

    def offer(self, rows: list[Row]) -> list[Row]:
        return self.rollouter.offer(rows)

    def roll_out(self, *args: Any, **options: Any) -> list[list[Rollout]]:
        with self.reference.active():
            return self.rollouter.roll_out(*args, **options)
