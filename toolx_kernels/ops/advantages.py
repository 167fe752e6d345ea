"""Group-relative advantages: the reward of a completion compared with those of its group."""

from __future__ import annotations

import torch
from torch import Tensor

from toolx_kernels.errors import InputError, short
from toolx_kernels.ops import library
from toolx_kernels.ops.lm_head.checks import check_tensors
from toolx_kernels.reference import compute_dtype
from toolx_kernels.settings import COUNT, NOT_NEGATIVE, between, check_number

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch comes without triton
    triton = None


def group_advantages(
    rewards: Tensor,  # (B)
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,  # (B) integers; completions with equal ids form a group
    scale: str = "group",
    eps: float = 1e-4,
    min_std: float = 0.0,
    check_finite: bool = True,
) -> Tensor:
    """``(r - mean) / (max(std, min_std) + eps)`` over each group, (B) in fp32 (float64 for float64 rewards).

    The std is torch's unbiased one, as in TRL: that of the ``group``, that of the whole ``batch``, or ``none``
    (``scale``). ``min_std`` keeps a small bonus small: in {1, 1, 1, 1, 1.01} the last gets 1.75 without it and
    0.08 at 0.1; 0.1 does not change the advantages of 0/1 rewards in groups of up to 64. A group whose rewards are all
    equal gets exact zeros, decided by comparing the rewards: in floating point the mean of equal numbers is not
    always that number. The sums are float64, because the squares of large fp32 rewards are no finite fp32 numbers.
    With ``check_finite=False`` the caller checks the rewards; the check waits for a GPU.
    Source: arXiv 2402.03300, 4.1.2.

    Raises:
        InputError: neither or both of group_size and group_ids, a group_size that does not divide B, an unknown scale,
            a ``min_std`` that is negative or not finite, a reward that is not a finite fp32 number.
    """
    check_tensors(rewards=rewards)
    if rewards.ndim != 1 or rewards.shape[0] == 0:
        raise InputError(f"rewards {tuple(rewards.shape)} must be one number per completion.")
    if not (isinstance(scale, str) and scale in ("group", "batch", "none")):
        raise InputError(f"scale={short(scale)} is unknown: choose one of group, batch, none.")
    min_std = check_number("min_std", min_std, NOT_NEGATIVE, whole=False)
    eps = check_number("eps", eps, NOT_NEGATIVE, whole=False)
    if not isinstance(check_finite, bool):
        raise InputError(f"check_finite={short(check_finite)} must be True or False.")
    if group_size is not None and group_ids is None:
        group_size = check_number("group_size", group_size, between(1, COUNT))
        if rewards.shape[0] % group_size:
            raise InputError(f"group_size={group_size} does not divide the {len(rewards)} rewards.")
    elif group_ids is not None and group_size is None:
        if not isinstance(group_ids, Tensor) or group_ids.layout != torch.strided:
            raise InputError(f"group_ids is {short(group_ids)}: pass a tensor of one integer per completion.")
        if group_ids.shape != rewards.shape:
            raise InputError(
                f"group_ids {tuple(group_ids.shape)} must have one entry for each of the {len(rewards)} rewards."
            )
        if group_ids.is_floating_point() or group_ids.is_complex() or group_ids.device != rewards.device:
            raise InputError(
                f"group_ids is {group_ids.dtype} on {group_ids.device}: it must hold integers on {rewards.device}."
            )
    else:
        raise InputError("Give either group_size or group_ids, so that the groups are known.")
    whole = not rewards.is_floating_point()  # fp32 does not hold every int64
    rewards = rewards.detach().to(torch.float64 if whole else compute_dtype(rewards))
    advantages = torch.ops.toolx.group_advantages(
        rewards, group_size or 0, group_ids, scale, eps, min_std, check_finite
    )
    return advantages.float() if whole else advantages


def check_rewards(rewards: Tensor) -> None:
    """Raises InputError for a reward that is not finite, also in fp32."""
    fine = rewards.float().isfinite()
    if not fine.all():
        at = int((~fine).nonzero()[0])
        raise InputError(f"rewards[{at}] = {float(rewards[at])} is not finite in fp32: a reward must be a number.")


def in_torch(
    rewards: Tensor, group_size: int, group_ids: Tensor | None, scale: str, eps: float, min_std: float,
    check_finite: bool = True,
) -> Tensor:  # fmt: skip
    if check_finite:
        check_rewards(rewards)
    dtype, rewards, tiny = rewards.dtype, rewards.double(), torch.finfo(torch.float64).tiny
    if group_ids is None:
        sizes = torch.full((len(rewards) // group_size,), group_size, device=rewards.device)
        order = torch.arange(len(rewards), device=rewards.device)
        group = order // group_size
    else:
        _, group, sizes = group_ids.unique(return_inverse=True, return_counts=True)
        order = group.argsort(stable=True)

    def of_groups(values: Tensor, reduce: str) -> Tensor:  # (groups); adds up in the order of the batch on every device
        return torch.segment_reduce(values[order], reduce, lengths=sizes, unsafe=True)

    low, high = of_groups(rewards, "min")[group], of_groups(rewards, "max")[group]
    advantages = rewards - (of_groups(rewards, "sum") / sizes)[group]
    if scale == "group":
        spread = (high - low).clamp(min=tiny)  # squares of what is divided by it do not underflow
        advantages = advantages / spread
        variance = of_groups(advantages.square(), "sum") / (sizes - 1).clamp(min=1)
        advantages = advantages / (torch.maximum(variance.sqrt()[group], min_std / spread) + eps / spread)
    elif scale == "batch" and len(rewards) > 1:
        spread = (rewards.amax() - rewards.amin()).clamp(min=tiny)
        std = ((rewards - rewards.mean()) / spread).std()
        advantages = advantages / spread / (torch.maximum(std, min_std / spread) + eps / spread)
    return torch.where(low == high, 0, advantages).to(dtype)


if triton is not None:

    @triton.jit(do_not_specialize=["B"])  # else another batch size may recompile it
    def advantages_kernel(
        rewards_ptr, ids_ptr, out_ptr,  # (B)
        B, group_size, eps, min_std,
        HAS_IDS: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program per completion: it looks for its siblings among all B, twice (mean, then variance)."""
        i = tl.program_id(0)
        offs = tl.arange(0, BLOCK)
        own = tl.load(rewards_ptr + i).to(tl.float64)
        zero = tl.full((), 0.0, tl.float64)
        count, total, everything = zero, zero, zero
        low, high = own, own
        for start in range(0, B, BLOCK):
            j = start + offs
            inside = j < B
            r = tl.load(rewards_ptr + j, mask=inside, other=0.0).to(tl.float64)
            if HAS_IDS:
                sibling = inside & (tl.load(ids_ptr + j, mask=inside, other=0) == tl.load(ids_ptr + i))
            else:
                sibling = inside & (j // group_size == i // group_size)
            count += tl.sum(tl.where(sibling, 1.0, 0.0), 0)
            total += tl.sum(tl.where(sibling, r, 0.0), 0)
            everything += tl.sum(r, 0)
            low = tl.minimum(low, tl.min(tl.where(sibling, r, own), 0))
            high = tl.maximum(high, tl.max(tl.where(sibling, r, own), 0))
        mean = total / count
        advantage = own - mean
        if SCALE != "none":
            centre = mean if SCALE == "group" else everything / B
            squares = zero
            for start in range(0, B, BLOCK):
                j = start + offs
                counts = j < B
                if SCALE == "group":
                    if HAS_IDS:
                        counts = counts & (tl.load(ids_ptr + j, mask=j < B, other=0) == tl.load(ids_ptr + i))
                    else:
                        counts = counts & (j // group_size == i // group_size)
                r = tl.load(rewards_ptr + j, mask=j < B, other=0.0).to(tl.float64)
                d = tl.where(counts, r - centre, 0.0)
                squares += tl.sum(d * d, 0)
            freedom = count - 1.0 if SCALE == "group" else B - 1.0
            std = tl.sqrt(squares / tl.maximum(freedom, 1.0))
            advantage = advantage / (tl.maximum(std, min_std) + eps)
        tl.store(out_ptr + i, tl.where(low == high, 0.0, advantage))


def in_triton(
    rewards: Tensor, group_size: int, group_ids: Tensor | None, scale: str, eps: float, min_std: float,
    check_finite: bool = True,
) -> Tensor:  # fmt: skip
    if rewards.dtype != torch.float32:
        return in_torch(rewards, group_size, group_ids, scale, eps, min_std, check_finite)
    if check_finite:
        check_rewards(rewards)
    rewards, out = rewards.contiguous(), torch.empty_like(rewards)
    ids = rewards if group_ids is None else group_ids.contiguous()
    with torch.cuda.device_of(rewards):
        advantages_kernel[(len(rewards),)](
            rewards, ids, out, len(rewards), group_size, eps, min_std,
            HAS_IDS=group_ids is not None, SCALE=scale, BLOCK=1024,
        )  # fmt: skip
    return out


library.define(
    "group_advantages(Tensor rewards, int group_size, Tensor? group_ids, str scale, float eps, float min_std, "
    "bool check_finite=True) -> Tensor",
    default=in_torch,
    fake=lambda rewards, *_: rewards.new_empty(rewards.shape),
    triton=in_triton,
)
