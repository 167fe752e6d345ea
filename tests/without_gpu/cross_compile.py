"""Cross-compiler of the Triton kernels for chips that are not present; prints the resources used, one JSON line each.

    python -m tests.without_gpu.cross_compile [--every] 80 86

Without ``--every``, kernels whose tile depends on the chip are compiled only in the forms that take the most registers.
Triton caches its results by the hash of everything they depend on. Run without TRITON_INTERPRET: an interpreted kernel
cannot be compiled.
"""

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from toolx_kernels.engine import bit_sum, bit_sum_triton
from toolx_kernels.loss_config import GRPOLossConfig
from toolx_kernels.ops import advantages
from toolx_kernels.ops.attention import paged_tiles, paged_triton
from toolx_kernels.ops.lm_head import live_rows, per_row, sampling_triton, scaling, sweep_triton, tiles
from toolx_kernels.ops.triton_common import OF_HEAD

CHIPS = (80, 86, 89, 90, 120)
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}  # limit of a block
LEAST = 86
ELEMENTS = {"bf16": 2, "fp16": 2, "fp32": 4}
DOT_DTYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}

INT64 = {"targets_ptr", "source_ptr", "index_ptr", "ids_ptr", "slots_ptr", "streams_ptr", "tokens_ptr"}
INT64 |= {"parts_ptr", "sums_ptr", "facts_ptr", "rows_ptr"}
INT32 = {"cu_ptr", "block_table_ptr", "seq_lens_ptr", "cu_queries_ptr", "cu_groups_ptr", "prefix_lens_ptr", "token_ptr"}
FP32_OUT = {"add_online_kernel", "target_logits_kernel", "statistics_kernel", "advantages_kernel"}
NARROW = OF_HEAD | {  # half precision if the head and the cache are
    "gradient_ptr", "query_ptr", "key_ptr", "value_ptr", "key_cache_ptr", "value_cache_ptr",
}  # fmt: skip
FLOATS = {"softcap", "eps", "min_std", "scale"}
ANY_NUMBER = {"start", "B", "group_size"}  # not known to be multiples of 16


def kernels() -> dict:
    """Every Triton kernel, by name."""
    kernel = type(sweep_triton.sweep_kernel)
    modules = (
        sweep_triton, per_row, live_rows, scaling, advantages, paged_triton, sampling_triton, bit_sum_triton
    )  # fmt: skip
    return {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("_kernel") and isinstance(value, kernel)
    }


def signature(name: str, constants: dict, dtype: str) -> tuple[dict, dict]:
    """The types of a kernel's arguments, and the arguments that are multiples of 16 at run time."""
    types, attributes = {}, {}
    for i, param in enumerate(kernels()[name].params):
        argument = param.name
        if argument in constants:
            types[argument] = "constexpr"
        elif argument in INT64 or (name, argument) == ("move_rows_kernel", "target_ptr"):
            types[argument] = "*i64"
        elif argument in INT32:
            types[argument] = "*i32"
        elif argument == "mask_ptr":
            types[argument] = "*i1"
        elif argument.endswith("_ptr"):
            narrow = argument in NARROW and not (argument == "out_ptr" and name in FP32_OUT)
            narrow &= (name, argument) != ("sample_kernel", "bias_ptr")  # fp32 there
            narrow &= name not in ("statistics_kernel", "place_rows_kernel")  # their weights are loss weights, in fp32
            narrow &= (argument, constants.get("DIRECT")) != ("out_ptr", False)  # partial results
            types[argument] = f"*{dtype if narrow else 'fp32'}"
        else:
            types[argument] = "fp32" if argument in FLOATS else "i32"
        varies = param.do_not_specialize or param.do_not_specialize_on_alignment or argument in ANY_NUMBER
        if types[argument] not in ("constexpr", "fp32") and not varies:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return types, attributes


FLAGS = ("HAS_BIAS", "HAS_SOFTCAP")
STRIDES = {"stride_hd": 1, "stride_wd": 1}
# Together these take every branch of the objective in a kernel.
OBJECTIVES = (
    {"delta": 1.4, "beta": 0.1, "use_bias_correction_kl": True, "entropy_coef": 0.1},
    {"loss_type": "cispo", "epsilon_high": 5.0, "beta": 0.1, "kl_estimator": "k1", "kl_gradient": "none"},
    {"loss_type": "sapo", "importance_sampling_mode": "token_mask", "kl_estimator": "k2", "beta": 0.1},
)


def cases(chip: int, every: bool):
    """Yields (label, name of the kernel, constants, dtype, (warps, stages))."""
    yield from sweep_cases(chip, every)
    yield from attention_cases(chip, every)
    yield from sample_cases(chip, every)
    yield from cases_without_tiles()


def sweep_cases(chip: int, every: bool):
    """Cases of the sweep; fp16 compiles like bf16, so it is never the hardest."""
    plain, everything = ({**dict.fromkeys(FLAGS, on), **STRIDES} for on in (False, True))
    modes = enumerate(("online", "exponentials", "gradients"))
    for (mode, what), dtype, extras in itertools.product(modes, ELEMENTS, (plain, everything)):
        hardest = what == "exponentials" and dtype != "fp16"
        if not (hardest or every):
            continue
        tile = tiles.triton_tile((chip // 10, chip % 10), ELEMENTS[dtype])
        constants = {
            "MODE": mode, "ENTROPY": True, "EVEN_D": True, "GROUP": tiles.GROUP_ROWS,
            "DOT_DTYPE": DOT_DTYPES[dtype], "PRECISION": "tf32x3" if dtype == "fp32" else "ieee",
            "BLOCK_N": tile.block_n, "BLOCK_V": tile.block_v, "BLOCK_D": tile.block_d, **extras,
        }  # fmt: skip
        label = f"sweep {what}, {'everything' if extras is everything else 'plain'}"
        yield label, "sweep_kernel", constants, dtype, (tile.warps, tile.stages)


def cases_without_tiles():
    small = {"BLOCK_N": 16, "BLOCK_T": 64}
    block = sweep_triton.BLOCK_OF_ROW
    elementwise = {
        "target_logits_kernel": {**dict.fromkeys(FLAGS, True), **STRIDES, "BLOCK_D": 1024},
        "reweigh_kernel": {"HAS_SOFTCAP": True, "BLOCK": block},
        "move_rows_kernel": {"BLOCK": block},
        "place_targets_kernel": {"BLOCK": 128},
        "finish_rows_kernel": {"stride_wd": 1, "BLOCK_D": 1024},
        "scale_kernel": {"BLOCK": 4096},
    }
    for dtype in ("bf16", "fp32"):
        for name, constants in elementwise.items():
            yield name.removesuffix("_kernel"), name, constants, dtype, (4, 3)
    yield "add_online", "add_online_kernel", {"ENTROPY": True, **small}, "fp32", (4, 3)
    for settings in OBJECTIVES:
        given = {name: True for name in ("HAS_OLD", "HAS_REF", "HAS_SAMPLER", "HAS_SOFTCAP")}
        config = GRPOLossConfig(**settings)
        constants = {"CONFIG": config, **given, "HAS_ENTROPY": bool(config.entropy_coef), **small}
        yield f"statistics {config.loss_type}", "statistics_kernel", constants, "fp32", (4, 3)
    for flags in ((), ("EVERY_ROW",), ("PER_TOKEN",), ("PER_TOKEN", "WHOLE")):
        constants = {flag: flag in flags for flag in ("EVERY_ROW", "PER_TOKEN", "WHOLE")}
        constants |= {"HAS_MASK": True, "HAS_REWARDS": True, "BLOCK": 512}
        yield f"survey {flags}", "survey_kernel", constants, "fp32", (4, 3)
        if flags in ((), ("PER_TOKEN",)):
            yield f"place_rows {flags}", "place_rows_kernel", constants, "fp32", (4, 3)
    for scale in ("group", "batch"):
        constants = {"HAS_IDS": True, "SCALE": scale, "BLOCK": 1024}
        yield f"advantages {scale}", "advantages_kernel", constants, "fp32", (4, 3)
    merge = {"H": 14, "D": 80, "BLOCK_R": 4, "BLOCK_D": 128, "stride_od": 1}
    yield "merge", "merge_kernel", merge, "bf16", (4, 3)
    write = {"KV_HEADS": 2, "D": 64, "BLOCK": 128, "stride_kd": 1, "stride_vd": 1, "stride_s": 1}
    yield "kv_write", "kv_write_kernel", write, "bf16", (4, 3)
    yield "join_samples", "join_samples_kernel", {"BLOCK_N": 4, "BLOCK_T": 256}, "fp32", (4, 3)
    words = {"COLUMNS": bit_sum.COLUMNS, "ROWS": bit_sum_triton.ROWS, "BLOCK_R": bit_sum_triton.ROWS_AT_ONCE}
    yield "bit_sum", "bit_sum_kernel", words, "fp32", (4, 3)
    yield "add_gumbel", "add_gumbel_kernel", {"BLOCK": sampling_triton.BLOCK_OF_ROW}, "fp32", (4, 3)


def attention_cases(chip: int, every: bool):
    """The tiles of every head dim with window and softcap, seven heads per KV head; fp16 compiles like bf16.

    The small tile (decode) reads a shared prefix; the large one (prefill) writes its result directly.
    """
    sizes = {"KV_HEADS": 2, "SHARING": 7, "PAGE_SIZE": 16, "BLOCK_U": 512, "stride_qd": 1, "stride_od": 1}
    tiles_of = {"bf16": (("decode", 1), ("prefill", 1000)), "fp32": (("prefill", 1000),)}
    for dtype in ("bf16", "fp32"):
        for dim in (64, 128, 256):
            for what, queries in tiles_of[dtype]:
                hardest = what == "prefill" and dim > 64
                if not (hardest or every):
                    continue
                tile = paged_tiles.choose_tile((chip // 10, chip % 10), ELEMENTS[dtype], dim, 7, queries)
                constants = {
                    "PREFIX": queries == 1, "GROUPED": queries == 1, "DIRECT": queries > 1,
                    "HAS_WINDOW": True, "HAS_SOFTCAP": True, "D": dim, "BLOCK_D": dim,
                    "PRECISION": paged_tiles.dot_precision(ELEMENTS[dtype], dim, tile.block_m),
                    "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, **sizes,
                }  # fmt: skip
                yield f"attention {what} {dim}", "attention_kernel", constants, dtype, (tile.warps, tile.stages)


def sample_cases(chip: int, every: bool):
    """Cases of sampling; those without noise also return the logits."""
    for dtype, (n_rows, noisy) in itertools.product(("bf16", "fp32"), ((1, True), (64, True), (64, False))):
        hardest = n_rows == 64 and noisy == (dtype == "fp32")
        if not (hardest or every):
            continue
        tile = tiles.sampling_tile((chip // 10, chip % 10), ELEMENTS[dtype], n_rows)
        constants = {
            "NOISY": noisy, "HAS_LOGITS": not noisy, "HAS_BIAS": True, "HAS_SOFTCAP": True, "EVEN_D": True,
            "DOT_DTYPE": DOT_DTYPES[dtype], "PRECISION": "tf32x3" if dtype == "fp32" else "ieee",
            "BLOCK_N": tile.block_n, "BLOCK_V": tile.block_v, "BLOCK_D": tile.block_d,
            "stride_hd": 1, "stride_wd": 1,
        }  # fmt: skip
        label = f"sample {n_rows} rows, {'noise' if noisy else 'logits'}"
        yield label, "sample_kernel", constants, dtype, (tile.warps, tile.stages)


def compile_for(chip: int, name: str, constants: dict, dtype: str, launch: tuple[int, int]) -> dict:
    """Registers and stack bytes (spills) per thread, shared bytes per block, and the bits per load and store."""
    kernel = kernels()[name]
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    types, attributes = signature(name, constants, dtype)
    source = ASTSource(kernel, types, constants, attributes)
    options = {"num_warps": launch[0], "num_stages": launch[1]}
    compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        used = subprocess.run([tool, "-res-usage", cubin.name], check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf"{what}:(\d+)", used)[1]) for what in ("REG", "STACK"))
    moves = re.findall(r"\b(ld|st)\.global(?:\.\w+|::)*?(?:\.v(\d))?\.[bfu](\d+)", compiled.asm["ptx"])
    return {
        "moves": sorted({(kind, int(count or 1) * int(bits)) for kind, count, bits in moves}),
        "registers": registers,
        "stack": stack,
        "shared": compiled.metadata.shared,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m tests.without_gpu.cross_compile", description=__doc__.splitlines()[0]
    )
    parser.add_argument("chips", type=int, nargs="+", choices=CHIPS)
    parser.add_argument("--every", action="store_true")
    asked = parser.parse_args()
    for chip in asked.chips:
        for what, name, constants, dtype, launch in cases(chip, asked.every):
            found = compile_for(chip, name, constants, dtype, launch)
            print(json.dumps({"chip": chip, "what": f"{what} {dtype}", "kernel": name, **found}), flush=True)
