"""Launches of a Triton kernel that are looked at and not made."""

import torch


class Launches:
    """In place of ``kernel``: the grids that it would be launched on, and what it would be compiled for."""

    def __init__(self, kernel):
        settings = getattr(kernel, "kwargs", vars(kernel))
        self.names, self.any_value = kernel.arg_names, settings["do_not_specialize"] or ()
        self.any_address = settings["do_not_specialize_on_alignment"] or ()
        self.grids, self.variants = [], set()

    def __getitem__(self, grid):
        self.grids.append(grid)
        return self._launch

    def _launch(self, *arguments, **options):
        seen = {name: self._seen(name, value) for name, value in zip(self.names, arguments, strict=False)}
        self.variants.add(tuple(sorted((seen | options).items(), key=str)))

    def _seen(self, name, value):
        """What Triton's just-in-time compiler sees of an argument that is no constexpr."""
        if isinstance(value, torch.Tensor):
            return value.dtype, name in self.any_address or value.data_ptr() % 16 == 0
        if isinstance(value, float) or name in self.any_value:
            return type(value)
        return value == 1, value % 16 == 0
