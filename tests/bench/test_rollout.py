"""The rollout benchmark on tiny models: its providers sample from the model; floor and report are correct."""

import csv
import json
import math
import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from bench.common.absent import Absent
from bench.loss.report import REPORT as LOSS_REPORT
from bench.rollout import measure as measuring
from bench.rollout.cases import Case, Floor, make_prompts, model_of, token_bytes
from bench.rollout.measure import measure
from bench.rollout.providers import VLLM, FromFolder, HFGenerate, NanoVLLM, RolloutProvider, Toolx, TransformersBatching
from bench.rollout.report import REPORT
from tests.ops.cases import DEVICE

TINY = Case("tiny", 3, 40, 4, 6, "float32")


def tiny():
    model = model_of("tiny", "float32", DEVICE)
    return model, make_prompts(TINY, model.config.vocab_size, 0)


def test_the_work_is_the_same_each_time_and_as_large_as_the_case_says():
    model, prompts = tiny()
    assert prompts == make_prompts(TINY, model.config.vocab_size, 0) != make_prompts(TINY, model.config.vocab_size, 1)
    assert [len(ids) for ids in prompts] == [38, 40, 42]
    assert model.generation_config.eos_token_id is None
    assert token_bytes(model) == 2 * 2 * 2 * 64 * 4  # keys and values, layers, heads, head dim, fp32


@pytest.mark.parametrize("size, parameters", [("0.5b", 494_032_768), ("1.5b", 1_543_714_304), ("3b", 3_085_938_688)])
def test_shapes_are_those_of_the_published_models(size, parameters):
    model = model_of(f"qwen2.5-{size}-shape", "bfloat16", torch.device("meta"))
    assert model.num_parameters() == parameters and model.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [Toolx, HFGenerate, TransformersBatching], ids=lambda kind: kind.name)
def test_every_provider_samples_from_the_model(kind):
    model, prompts = tiny()
    prompts[1] = prompts[1][:5]  # for providers that pad, most of this row is padding
    many = Case("tiny", len(prompts), 40, 96, 6, "float32")
    provider = kind(model, many)
    torch.manual_seed(0)
    completions = provider.generate(prompts, 6)
    provider.close()
    assert len(completions) == many.rows and all(len(completion) == 6 for completion in completions)
    for at, prompt in enumerate(prompts):
        sampled = torch.tensor(completions[at * many.n : (at + 1) * many.n], device=DEVICE)
        ids = torch.cat((torch.tensor(prompt, device=DEVICE).expand(many.n, -1), sampled), 1)
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[:, len(prompt) - 1 : -1].double().log_softmax(-1)
        taken = logprobs.gather(2, sampled[..., None]).squeeze(2)
        # The log-prob of a token drawn from this distribution differs from minus its entropy by 0 on average.
        gaps = taken - (logprobs.exp() * logprobs).sum(2)
        assert abs(gaps.mean()) < 4 * gaps.std() / gaps.numel() ** 0.5


def test_ours_counts_the_pages_of_shared_prompts_once():
    model, prompts = tiny()
    ours, theirs = Toolx(model, TINY), HFGenerate(model, TINY)
    ours.generate(prompts, 6), theirs.generate(prompts, 6)
    page = ours.engine.pool.page_size
    shared = sum(len(ids) // page for ids in prompts)
    own = sum(-(-(len(ids) + 5) // page) - len(ids) // page for ids in prompts)
    most = shared + TINY.n * own + len(prompts)  # plus each prompt's partly filled page, while it is forked
    assert (shared + TINY.n * own) * page <= ours.kv_bytes / token_bytes(model) <= most * page
    assert theirs.kv_bytes == TINY.rows * (42 + 5) * token_bytes(model)


def test_the_floor_is_the_linear_layers_and_the_bytes_of_the_cache():
    model, _ = tiny()
    floor = Floor(model, TINY)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert floor.weight_bytes == 4 * linear  # the tied head is a Linear too
    with FlopCounterMode(display=False) as counter:
        floor._gemms()
    assert counter.get_total_flops() == 2 * TINY.rows * linear
    assert floor.kv_bytes == (3 * 40 + 12 * 3) * token_bytes(model)
    assert floor.bytes_per_second(0.5) == pytest.approx(2 * 2**30, rel=1e-2)
    assert torch.equal(floor.read(), torch.full_like(floor.matrix[0], len(floor.matrix)))


def test_generate_takes_fewer_prompts_at_once_where_memory_is_short(monkeypatch):
    model, prompts = tiny()
    provider = HFGenerate(model, TINY)
    whole, sizes = provider.batch, []

    def batch(prompts, *others):
        sizes.append(len(prompts))
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return whole(prompts, *others)

    monkeypatch.setattr(provider, "batch", batch)
    assert len(provider.generate(prompts, 2)) == TINY.rows
    assert sizes == [3, 2, 1, 1, 1] and provider.note == "prompts at once, because of memory: 1"


class Stops(RolloutProvider):
    """A peer that stops short after its first whole call."""

    name = "stops"
    calls = closed = 0

    def generate(self, prompts, new):
        Stops.calls += 1
        short = new - (Stops.calls > 1)
        return [[5] * short for _ in prompts for _ in range(self.case.n)]

    def close(self):
        Stops.closed += 1


class Lacks(FromFolder):
    name = "lacks"
    package = "not-here-at-all"

    def load(self):
        import not_here_at_all  # noqa: F401


class Fails(RolloutProvider):
    name = "fails"

    def generate(self, prompts, new):
        raise RuntimeError("no kernel\nand more")


@pytest.fixture(scope="module")
def measured():
    Stops.calls = Stops.closed = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "SLOW", math.inf)  # every peer takes part in both rounds, however slow
        return measure(TINY, (HFGenerate, Stops, Lacks, Fails), DEVICE, rounds=2)


def test_a_provider_that_fails_is_named_with_its_reason_and_the_others_are_timed(measured):
    records = {record["provider"]: record for record in measured["records"]}
    assert records["stops"]["absent"] == "60 of 72 tokens after 300 s" and Stops.closed == 1
    assert records["lacks"]["absent"] == "not_here_at_all is not installed: pip install not-here-at-all"
    assert records["fails"]["absent"] == "RuntimeError: no kernel"
    for name in ("toolx", "HF generate"):
        record = records[name]
        assert [len(taken) for taken in record["rounds_s"].values()] == [2, 2]
        assert record["tokens_per_s"] == pytest.approx(72 / record["whole_s"], rel=5e-2)
        assert record["step_ms"] == pytest.approx(1e3 * (record["whole_s"] - record["prefill_s"]) / 5, abs=0.05)
    assert 0 < records["toolx"]["kv_mib"] < records["HF generate"]["kv_mib"]
    floor = measured["floor"]
    assert 0 < floor["kv_ms"] < floor["ms"] == pytest.approx(floor["gemms_ms"] + floor["kv_ms"], abs=1e-3)
    assert floor["bytes_ms"] > floor["kv_ms"] and floor["bandwidth_gb_s"] > 0.1


def test_our_own_failure_is_not_hidden(monkeypatch):
    def fails(self, prompts, new):
        raise RuntimeError("a bug")

    monkeypatch.setattr(Toolx, "generate", fails)
    with pytest.raises(RuntimeError, match="a bug"):
        measure(TINY, (), DEVICE, rounds=1)


@pytest.mark.parametrize("device, whole", [("cpu", 2), ("cuda", 1)])
def test_a_peer_that_is_much_slower_prefills_once_and_on_a_gpu_samples_once(monkeypatch, device, whole):
    class Slow(HFGenerate):
        name = "slow"

        def generate(self, prompts, new):
            took.append(5.0)
            return super().generate(prompts, new)

    took = []

    def seconds(call, device):
        took[:] = [1.0]
        call()
        return took[-1]

    monkeypatch.setattr(measuring, "seconds", seconds)
    monkeypatch.setattr(measuring, "added_peak", lambda call, device: call() or 0)
    model, _ = tiny()
    monkeypatch.setattr(measuring, "model_of", lambda *_: model)
    measured = measure(TINY, (Slow,), torch.device(device), rounds=2)
    records = {record["provider"]: record for record in measured["records"]}
    assert records["slow"]["whole_s"] == 5 and records["toolx"]["whole_s"] == 1
    assert {what: len(taken) for what, taken in records["slow"]["rounds_s"].items()} == {"whole": whole, "prefill": 1}


class OnGPU:
    """The tiny model, presented as a model on a GPU, of a kind that nano-vllm runs."""

    device, dtype = torch.device("cuda"), torch.float32

    def __init__(self, model):
        self.save_pretrained, self.parameters = model.save_pretrained, model.parameters
        self.config = Qwen3Config(**{k: v for k, v in model.config.to_dict().items() if k != "model_type"})


class Engine:
    """The common part of vLLM and nano-vllm: the constructor reads the whole folder, which is deleted afterwards."""

    def __init__(self, folder, *, gpu_memory_utilization, max_model_len, max_num_seqs):
        self.model = AutoModelForCausalLM.from_pretrained(folder)
        assert len(AutoTokenizer.from_pretrained(folder)) == self.model.config.vocab_size
        assert max_model_len >= 42 + TINY.new and max_num_seqs == TINY.rows
        self.share, self.exited = gpu_memory_utilization, False

    def exit(self):
        self.exited = True


class VLLMEngine(Engine):
    def __init__(self, model, *, dtype, enable_prefix_caching, skip_tokenizer_init, **options):
        assert dtype == "float32" and enable_prefix_caching and skip_tokenizer_init
        super().__init__(model, **options)

    def generate(self, prompts, sampling_params, *, use_tqdm):
        assert all(list(prompt) == ["prompt_token_ids"] for prompt in prompts) and not use_tqdm
        samples = [
            SimpleNamespace(token_ids=tuple([at] * sampling_params.max_tokens)) for at in range(sampling_params.n)
        ]
        return [SimpleNamespace(outputs=samples) for _ in prompts]


class NanoEngine(Engine):
    def generate(self, prompts, sampling_params, use_tqdm):
        samples = [at % TINY.n for at in range(len(prompts))]
        assert all(prompts[at] == prompts[at - sample] for at, sample in enumerate(samples)) and not use_tqdm
        return [{"text": "", "token_ids": [sample] * sampling_params.max_tokens} for sample in samples]


@dataclass
class VLLMParams:
    n: int = 1
    temperature: float = 1.0
    max_tokens: int = 16
    ignore_eos: bool = False
    detokenize: bool = True


@dataclass
class NanoParams:
    temperature: float = 1.0
    max_tokens: int = 64
    ignore_eos: bool = False


@pytest.mark.parametrize(
    "kind, module, engine, params",
    [(VLLM, "vllm", VLLMEngine, VLLMParams), (NanoVLLM, "nanovllm", NanoEngine, NanoParams)],
    ids=["vLLM", "nano-vllm"],
)
def test_engines_that_load_from_a_folder_by_their_public_interface(monkeypatch, kind, module, engine, params):
    stand_in = ModuleType(module)
    stand_in.LLM, stand_in.SamplingParams, stand_in.__spec__ = engine, params, ModuleSpec(module, None)
    monkeypatch.setitem(sys.modules, module, stand_in)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (30 * 2**30, 32 * 2**30))
    model, prompts = tiny()
    provider = kind(OnGPU(model), TINY)
    # the weights and 4 GiB of 32 GiB; nano-vllm also counts the 2 GiB in use
    assert provider.engine.share == pytest.approx((4 + 2 * (kind is NanoVLLM)) / 32, rel=1e-2)
    for ours, theirs in zip(model.parameters(), provider.engine.model.parameters(), strict=True):
        assert torch.equal(ours.cpu(), theirs)
    assert provider.generate(prompts, 5) == [[at] * 5 for at in range(TINY.n)] * len(prompts)
    kept = provider.engine
    provider.close()
    assert kept.exited == (kind is NanoVLLM)


@pytest.mark.skipif(find_spec("nanovllm") is not None, reason="it is installed")
def test_an_engine_that_no_index_has_says_where_it_comes_from():
    with pytest.raises(Absent, match="github.com/GeeeekExplorer/nano-vllm"):
        NanoVLLM(tiny()[0], TINY)


def test_each_report_takes_its_own_and_leaves_the_rest(measured, tmp_path, capsys):
    info = json.loads(json.dumps(measured))
    record = {
        "machine_info": {"slug": "some-cpu", "device": "Some CPU", "torch": "2.13.0"},
        "datetime": "2026-01-02T03",
        "benchmarks": [
            {"name": "test_kv_write", "extra_info": {}},
            {"name": "test_loss", "extra_info": {"loss": {"case": {}, "records": []}}},
            {"name": "test_rollout", "extra_info": {"rollout": info}},
        ],
    }
    # known times, so that the ratios are known
    info["floor"] |= {"ms": 10.0, "bytes_ms": 6.0}
    info["records"][0] |= {"tokens_per_s": 3000.0, "step_ms": 12.0, "kv_mib": 0.25}
    info["records"][1] |= {"tokens_per_s": 1000.0, "step_ms": 30.0, "note": "half of it at once"}
    info["case"]["kv_duplicated_mib"] = 1.0
    folder = REPORT.write(record, tmp_path)
    plots = {"rollout.png"} if find_spec("matplotlib") else set()
    assert {path.name for path in folder.iterdir()} == {"rollout.csv", "rollout.md"} | plots
    rows = {row["provider"]: row for row in csv.DictReader((folder / "rollout.csv").open())}
    assert list(rows) == ["toolx", "HF generate", "stops", "lacks", "fails", "floor"]
    assert rows["HF generate"]["speedup_of_toolx"] == "3.0" and rows["HF generate"]["step_to_floor"] == "3.0"
    ours = rows["toolx"]
    assert (ours["step_to_floor"], ours["share_of_bandwidth"], ours["kv_share"]) == ("1.2", "0.5", "0.25")
    text = (folder / "rollout.md").read_text()
    assert "| tiny fp32, 3 prompts of 40, 4 x 6 tokens | toolx | 3,000 | 1.00 x |" in text
    assert "- HF generate (tiny fp32, 3 prompts of 40, 4 x 6 tokens): half of it at once" in text
    assert "- fails: RuntimeError: no kernel" in text and "2026-01-02" in text and "transformers 5" in text

    path = tmp_path / "bench.json"
    path.write_text(json.dumps(record))
    assert LOSS_REPORT.main([str(path)]) == 0
    assert "holds no measurement of the loss" in capsys.readouterr().out
    assert {p.name for p in Path(folder).iterdir()} == {"rollout.csv", "rollout.md"} | plots
