"""Tiles: mode, chunk and tile sizes of every sweep over the vocabulary, all chosen here.

Two orders of the same work (costs in FLOPs, as multiples of N * D * V):

- **single sweep**, 6 (4 with a frozen head): the exponentials of all V logits of a chunk of rows are kept until the
  rows' coefficients are known. Each chunk passes once over the weight and its fp32 gradient, so it must have many rows.
- **recompute**, 8 (6): a first sweep for the log-probs, and a second one, vocabulary tile by tile, for the gradients.
  It needs no fp32 gradient of the whole weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

CPU_WORKSPACE_BYTES = 64 << 20
GPU_WORKSPACE_BYTES = 512 << 20, 2 << 30  # lower and upper limit of GPU_WORKSPACE_PERCENT
GPU_WORKSPACE_PERCENT = 3  # of the card's memory
SMALLEST_WORKSPACE_BYTES = 1 << 20  # with less, tiles are so small that the GEMMs are all overhead
CPU_TILE_BYTES = 8 << 20  # a tile is read several times, so it should stay in the last-level cache
GPU_TILE_BYTES = 24 << 20  # half of an H100's L2 cache
CPU_SWEEP_ROWS = 160  # with fewer rows per chunk, the passes over the weight cost more than a second sweep
GPU_SWEEP_ROWS = 768


class SweepSize(NamedTuple):
    """rows: tokens whose exponentials or logit gradients are in memory at a time. columns: width of a vocabulary tile.

    dtype: storage of these. gemm_dtype: of the two gradient GEMMs.
    """

    rows: int
    columns: int
    dtype: torch.dtype
    gemm_dtype: torch.dtype


class Card(NamedTuple):
    """The properties of a GPU that plans depend on; an argument, so that a plan can be made on another machine."""

    memory: int  # bytes
    processors: int  # streaming multiprocessors


def card_of(device: torch.device) -> Card:
    """The properties of the GPU in this machine; they are read only here."""
    properties = torch.cuda.get_device_properties(device)
    return Card(properties.total_memory, properties.multi_processor_count)


def default_workspace_bytes(device: torch.device, card: Card | None = None) -> int:
    """64 MiB on a CPU; 3 % of a GPU's memory, but from 512 MiB to 2 GiB."""
    if device.type == "cpu":
        return CPU_WORKSPACE_BYTES
    least, most = GPU_WORKSPACE_BYTES
    return _between(least, (card or card_of(device)).memory * GPU_WORKSPACE_PERCENT // 100, most)


def workspace_bytes(
    device: torch.device, n_rows: int, vocab_size: int, workspace_mib: int | None = None, card: Card | None = None
) -> int:
    """The limit of a sweep's memory in addition to its results (an fp32 sum of the weight's gradient is a result); at
    most a quarter of fp32 logits, if that is over 1 MiB."""
    given = default_workspace_bytes(device, card) if workspace_mib is None else workspace_mib << 20
    return min(given, max(n_rows * vocab_size, SMALLEST_WORKSPACE_BYTES))


def gemm_dtypes(device: torch.device, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of stored exponentials and of the gradient GEMMs, for a head in ``dtype``.

    On a CPU everything is multiplied in fp32, and bf16 only halves the workspace. Without AMX that is faster (measured:
    300 compared with 160 GFLOP/s on two cores with AVX512-BF16). AMX is three times as fast as fp32, but torch has no
    bf16 product with an fp32 result there: it would round the logits, and each chunk's part of the weight's gradient.
    Only the product for hidden's gradient could use it, which would save a sixth by these rates; that was not measured.
    fp16 cannot hold exponentials.
    """
    if device.type != "cpu":
        return dtype, dtype
    wide = torch.promote_types(dtype, torch.float32)
    return (dtype if dtype == torch.bfloat16 else wide), wide


def single_sweep_size(
    n_rows: int,
    vocab_size: int,
    dim: int,
    device: torch.device,
    dtype: torch.dtype,
    workspace_mib: int | None = None,
    *,
    n_tokens: int | None = None,
    trains_weight: bool = True,
    card: Card | None = None,
) -> SweepSize | None:
    """The size of a single sweep, or None if recomputing is cheaper or the dtype requires it.

    ``n_rows`` of the call's ``n_tokens`` are computed (default: all); the logits of ``n_tokens`` limit the workspace.
    """
    if dtype == torch.float16:  # fp16 gradients vanish unless the loss scale is known when they are formed
        return None
    budget = workspace_bytes(device, n_tokens or n_rows, vocab_size, workspace_mib, card)
    stored, gemm_dtype = gemm_dtypes(device, dtype)
    if device.type == "cpu":
        columns, weight_tile, logits_tile = min(vocab_size, 16384), 0, 0
        if dtype != gemm_dtype:  # slices of the weight and of E are copied
            columns = _between(1, min(CPU_TILE_BYTES, budget // 4) // (4 * dim), min(vocab_size, 4096))
            weight_tile, logits_tile = 2 * columns * dim * 4, 2 * columns * 4
        rows = (budget - weight_tile) * 7 // 8 // (vocab_size * stored.itemsize + logits_tile + 6 * dim * 4)
    else:
        columns, of_row = vocab_size, vocab_size * stored.itemsize + 6 * dim * 4
        rows = budget // of_row
        # All rows at once need no fp32 sum of the weight's gradient, so they may use its memory.
        spared = vocab_size * dim * max(4 - stored.itemsize, 0) if trains_weight else 0
        if n_rows * of_row <= budget + spared:
            rows = n_rows
    least = CPU_SWEEP_ROWS if device.type == "cpu" else GPU_SWEEP_ROWS
    if rows < min(n_rows, least):
        return None
    if device.type == "cpu" or rows >= n_rows:
        rows = _even(n_rows, rows, 32)
    else:
        rows = _in_waves(n_rows, rows, dim, (card or card_of(device)).processors)
    return SweepSize(rows, columns, stored, gemm_dtype)


def recompute_size(
    n_rows: int,
    vocab_size: int,
    dim: int,
    device: torch.device,
    dtype: torch.dtype,
    workspace_mib: int | None = None,
    card: Card | None = None,
) -> SweepSize:
    """The size of a gradient sweep with known log-sum-exps: half of the budget is for slices of the weight and of its
    gradient, half for tiles of logits and their gradients."""
    budget = workspace_bytes(device, n_rows, vocab_size, workspace_mib, card)
    stored, gemm_dtype = gemm_dtypes(device, dtype)
    on_cpu = device.type == "cpu"
    stored = gemm_dtype if on_cpu else stored
    columns = _between(1, budget // (2 * 8 * dim), min(vocab_size, 1024 if on_cpu else 16384))
    tile = min(budget // 2, CPU_TILE_BYTES if on_cpu else GPU_TILE_BYTES)
    alive = 4 * 4 if on_cpu else stored.itemsize  # bytes per logit: tiles of z, factor and exp besides the result
    columns = min(columns, max(1, tile // alive))
    return SweepSize(_between(1, tile // alive // columns, n_rows), columns, stored, gemm_dtype)


def forward_size(
    n_rows: int,
    vocab_size: int,
    dim: int,
    device: torch.device,
    workspace_mib: int | None = None,
    card: Card | None = None,
) -> SweepSize:
    """The size of a sweep that keeps only sums; on a GPU the rows limit the memory of the tiles' partial sums."""
    budget = workspace_bytes(device, n_rows, vocab_size, workspace_mib, card)
    if device.type != "cpu":
        partial = 3 * 4 * (vocab_size // 64 + 1)
        return SweepSize(_between(1, budget // partial, n_rows), vocab_size, torch.float32, torch.float32)
    columns = _between(1, min(CPU_TILE_BYTES, budget // 4) // (8 * dim), min(vocab_size, 4096))
    rows = _between(1, min(CPU_TILE_BYTES, budget // 4) // (8 * columns), n_rows)
    return SweepSize(rows, columns, torch.float32, torch.float32)


def _between(low: int, value: int, high: int) -> int:
    return max(low, min(value, high))


def _even(total: int, at_most: int, multiple: int) -> int:
    """The size of blocks of nearly equal length that cover ``total``, a multiple of ``multiple`` if that fits."""
    if total <= at_most:
        return max(total, 1)
    if at_most >= multiple:
        at_most -= at_most % multiple
    blocks = -(-total // at_most)
    size = -(-total // blocks)
    rounded = -(-size // multiple) * multiple
    return rounded if rounded <= at_most else size


def waves(n_rows: int, dim: int, processors: int) -> int:
    """The time of the product ``E W`` of ``n_rows`` rows, in units of one 128 x 128 tile on one processor.

    It has few tiles, each of which sums over the whole vocabulary, so a partial last wave costs as much as a full one.
    cuBLAS is assumed to choose the better of 128 x 128 and 128 x 256 tiles.
    """
    blocks = -(-n_rows // 128)
    return min(-(-blocks * -(-dim // width) // processors) * (width // 128) for width in (128, 256))


def _in_waves(n_rows: int, at_most: int, dim: int, processors: int) -> int:
    """The size of the chunks that cover ``n_rows``, a multiple of 128: as few chunks as possible, because each passes
    over the weight's gradient again, and among such sizes the one whose ``E W`` takes the fewest waves."""
    blocks, most = -(-n_rows // 128), at_most // 128
    n_chunks = -(-blocks // most)

    def total(size: int) -> int:
        last = blocks - (n_chunks - 1) * size
        return (n_chunks - 1) * waves(128 * size, dim, processors) + waves(128 * last, dim, processors)

    return 128 * min(range(-(-blocks // n_chunks), most + 1), key=total)


class TritonTile(NamedTuple):
    """The tile of one program: ``block_n`` rows times ``block_v`` tokens of the vocabulary, ``block_d`` of D a step."""

    block_n: int
    block_v: int
    block_d: int
    warps: int
    stages: int


# They compile without register spills and within each chip's shared memory (tests/without_gpu/test_cross_compile.py;
# all of them in make soak); keyed by (chip, bytes per element).
TRITON_TILES = {
    (80, 2): TritonTile(128, 128, 64, 8, 3),
    (86, 2): TritonTile(128, 128, 32, 8, 3),
    (89, 2): TritonTile(128, 128, 32, 8, 3),
    # 128 x 256 was 9 % faster on an H200 in the one form of the sweep that was tried; this one ran there in all forms.
    (90, 2): TritonTile(128, 128, 64, 8, 3),
    (120, 2): TritonTile(128, 128, 64, 8, 3),
    (80, 4): TritonTile(64, 128, 32, 8, 3),
    (86, 4): TritonTile(64, 128, 32, 8, 2),
    (89, 4): TritonTile(64, 128, 32, 8, 2),
    (90, 4): TritonTile(64, 128, 32, 8, 3),
    (120, 4): TritonTile(64, 128, 32, 8, 2),
}
INTERPRETED_TILE = TritonTile(16, 32, 16, 4, 1)
GROUP_ROWS = 16  # row blocks that go through the vocabulary together, so that a slice of the weight is read once


def triton_tile(capability: tuple[int, int] | None, itemsize: int) -> TritonTile:
    """The tile for a chip, or for the nearest older one in the table; ``capability`` None: for the interpreter."""
    if capability is None:
        return INTERPRETED_TILE
    chip = capability[0] * 10 + capability[1]
    known = [known for known, size in TRITON_TILES if size == itemsize and known <= chip]
    return TRITON_TILES[max(known, default=80), itemsize]


# A decoding step reads the whole weight for a few rows: its tiles are wide, and several are in flight at a time.
SAMPLING_TILES = {
    2: TritonTile(16, 128, 64, 4, 3),
    4: TritonTile(16, 128, 32, 4, 3),
}


def sampling_tile(capability: tuple[int, int] | None, itemsize: int, n_rows: int) -> TritonTile:
    """The tile of sampling for 1 to 512 rows; ``capability`` None: for the interpreter."""
    if capability is None:
        return INTERPRETED_TILE._replace(block_v=128)
    tile = SAMPLING_TILES[itemsize]
    if n_rows <= 16:
        return tile
    return tile._replace(block_n=32) if n_rows <= 32 else tile._replace(block_n=64, warps=8)
