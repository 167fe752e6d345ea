"""Launches of a Triton kernel, recorded instead of run."""

import torch


class Launches:
    """Stand-in for ``kernel`` that records the grids of its launches and the variants that they would compile."""

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
        """The properties of an argument, not a constexpr, that Triton's JIT puts into the compile key."""
        if isinstance(value, torch.Tensor):
            return value.dtype, name in self.any_address or value.data_ptr() % 16 == 0
        if isinstance(value, float) or name in self.any_value:
            return type(value)
        return value == 1, value % 16 == 0
