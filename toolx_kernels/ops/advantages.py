"""Group-relative advantages: how much better a completion is than its siblings."""

from __future__ import annotations

import torch
from torch import Tensor

from toolx_kernels.errors import InputError
from toolx_kernels.reference import compute_dtype


def group_advantages(
    rewards: Tensor,  # (B)
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,  # (B) integers; completions with equal ids form a group
    scale: str = "group",
    eps: float = 1e-4,
) -> Tensor:
    """``(r - mean) / (std + eps)`` over each group, (B) in fp32 (float64 for float64 rewards).

    The std is torch's unbiased one, as in TRL: of the ``group``, of the whole ``batch``, or ``none``
    (``scale``). A group whose rewards are all equal gets exact zeros, decided by comparing the rewards:
    in floating point the mean of equal numbers is not always that number. Source: arXiv 2402.03300, 4.1.2.

    Raises:
        InputError: neither or both of group_size and group_ids, sizes that do not divide, an unknown scale,
            a reward that is not finite.
    """
    if rewards.ndim != 1 or rewards.numel() == 0:
        raise InputError(f"rewards {tuple(rewards.shape)} must be one number per completion.")
    if (group_size is None) == (group_ids is None):
        raise InputError("Give either group_size or group_ids, so that the groups are known.")
    if scale not in ("group", "batch", "none"):
        raise InputError(f"scale={scale!r} is unknown: choose one of group, batch, none.")
    if group_ids is None:
        if group_size < 1 or len(rewards) % group_size:
            raise InputError(f"group_size={group_size} does not divide the {len(rewards)} rewards.")
        index = torch.arange(len(rewards), device=rewards.device) // group_size
        n_groups = len(rewards) // group_size
    else:
        if group_ids.shape != rewards.shape:
            raise InputError(
                f"group_ids {tuple(group_ids.shape)} must have one entry for each of the {len(rewards)} rewards."
            )
        unique, index = group_ids.unique(return_inverse=True)
        n_groups = len(unique)
    rewards = rewards.to(compute_dtype(rewards) if rewards.is_floating_point() else torch.float32)
    if not rewards.isfinite().all():
        at = int((~rewards.isfinite()).nonzero()[0])
        raise InputError(f"rewards[{at}] = {float(rewards[at])} is not finite: a reward must be a number.")

    member = index == torch.arange(n_groups, device=rewards.device)[:, None]  # (groups, B): B is small
    count = member.sum(1)
    mean = torch.where(member, rewards, 0).sum(1) / count
    centred = rewards - mean[index]
    infinity = torch.full_like(rewards, torch.inf)
    low = torch.where(member, rewards, infinity).amin(1)
    high = torch.where(member, rewards, -infinity).amax(1)
    if scale == "group":
        variance = torch.where(member, centred.square(), 0).sum(1) / (count - 1).clamp(min=1)
        centred = centred / (variance.sqrt()[index] + eps)
    elif scale == "batch" and len(rewards) > 1:
        centred = centred / (rewards.std() + eps)
    return torch.where((low == high)[index], 0, centred)
