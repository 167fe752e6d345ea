"""Checkpoints: exact, written whole or not at all, refused in one sentence, and enough for an identical resume."""

import json
import os
import resource
import shutil
import signal
import tempfile
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml

from tests.ops.cases import DEVICE
from tests.small_models import small_model
from tests.train.run.killing import outcome
from tests.train.test_trainer import SMALL, even_is_good, make_trainer
from toolx_kernels.errors import InputError
from toolx_kernels.files import write_atomically
from toolx_kernels.models.load import checkpoints, latest_checkpoint, load_model
from toolx_kernels.models.tiny import tiny_tokenizer
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.run import checkpoint as module
from toolx_kernels.train.run.checkpoint import load_weights, resumable_checkpoint, save_checkpoint
from toolx_kernels.train.run.folder import LOGS, MAY_DIFFER, RunFolder, binding_settings, check_same_settings
from toolx_kernels.train.run.stopping import Stop, Stopped

TOKENIZER = tiny_tokenizer()


class Moments:
    """Stands in for an optimizer; its state is a few tensors of several dtypes."""

    def __init__(self, seed=0, size=3000):
        g = torch.Generator().manual_seed(seed)
        self.tensors = {
            "a|exp_avg": torch.randn(size, generator=g).to(DEVICE),
            "a|codes": torch.randint(256, (size,), generator=g).to(DEVICE, torch.uint8),
            "b|step": torch.tensor(7.0 + seed),
            "b|exp_avg": torch.randn(5, 3, generator=g).to(DEVICE, torch.bfloat16),
        }

    def state_dict(self):
        return self.tensors

    def load_state_dict(self, tensors):
        self.tensors = {name: tensor.to(self.tensors[name].device, copy=True) for name, tensor in tensors.items()}


def bits(model, moments):
    named = {**model.state_dict(), **{f"optimizer {name}": tensor for name, tensor in moments.tensors.items()}}
    return {name: tensor.cpu().clone() for name, tensor in named.items()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def save(run, step, model=None, moments=None, keep=9, keep_first=False, **state):
    model = model or small_model("llama", seed=step).to(DEVICE)
    moments = moments or Moments(step)
    save_checkpoint(run, step, model, TOKENIZER, moments, state, keep=keep, keep_first=keep_first)
    return model, moments


def contents(run):
    return {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.fixture
def run(tmp_path):
    """A run folder with checkpoints of steps 2 and 4."""
    folder = tmp_path / "run"
    folder.mkdir()
    for step in (2, 4):
        save(folder, step, table=[{"id": "a"}], loss=0.1 * step)
    return folder


# ---- round trips


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_comes_back_to_the_bit(tmp_path, tied, dtype):
    model, moments = save(tmp_path, 3, small_model("llama", tied=tied).to(DEVICE, dtype), x=[0.1, None], y="ä")
    other, others = small_model("llama", tied=tied, seed=1).to(DEVICE, dtype), Moments(1)
    before = bits(other, others)
    read = resumable_checkpoint(tmp_path, other)
    assert same(bits(other, others), before), "reading changes nothing"
    read.copy_into(other, others)
    assert same(bits(other, others), bits(model, moments)) and not same(before, bits(model, moments))
    assert (read.path, read.state) == (tmp_path / "checkpoint-3", {"x": [0.1, None], "y": "ä"})


def test_what_is_loaded_outlives_its_checkpoint(run):
    model, moments = small_model("llama").to(DEVICE), Moments()
    resumable_checkpoint(run, model).copy_into(model, moments)
    expected = bits(model, moments)
    for path in run.rglob("*.safetensors"):
        path.write_bytes(bytes(path.stat().st_size))
    assert same(bits(model, moments), expected)


def test_a_later_save_of_a_step_replaces_its_state_alone(run, monkeypatch):
    """This happens after a probe, which changes no weights."""
    weights = run / "checkpoint-4" / "model.safetensors"
    before = weights.stat().st_ino, weights.stat().st_mtime_ns
    model, moments = save(run, 4, table=[{"id": "b"}])
    assert (weights.stat().st_ino, weights.stat().st_mtime_ns) == before
    assert resumable_checkpoint(run, model).state == {"table": [{"id": "b"}]}

    def killed(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save(run, 4, table=[])
    assert resumable_checkpoint(run, model).state == {"table": [{"id": "b"}]}
    assert not list(run.rglob("*.part"))


# ---- damaged or foreign checkpoints


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_a_damaged_file_is_refused_and_the_checkpoint_that_would_serve_is_named(run, damage):
    model, moments = small_model("llama").to(DEVICE), Moments()
    before, files = bits(model, moments), sorted(path.name for path in (run / "checkpoint-4").iterdir())
    assert {"model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json", "config.json"} <= set(files)
    for name in files:
        whole = (run / "checkpoint-4" / name).read_bytes()
        damage(run / "checkpoint-4" / name)
        with pytest.raises(InputError, match=f"checkpoint-4 .*{name}.*: remove it, .*continues from checkpoint-2") as e:
            resumable_checkpoint(run, model)
        assert str(e.value).count(". ") == 0 and "\n" not in str(e.value)
        with pytest.raises(InputError, match=f"checkpoint-4 .*{name}.* but it is the model before RL"):
            load_weights(run / "checkpoint-4", model)
        (run / "checkpoint-4" / name).write_bytes(whole)
    assert same(bits(model, moments), before)
    damage(run / "checkpoint-4" / files[0])
    damage(run / "checkpoint-2" / files[-1])
    with pytest.raises(InputError, match="checkpoint-4 .*: start a new run, no older one is whole"):
        resumable_checkpoint(run, model)


def test_another_format_names_both(run, monkeypatch):
    model = small_model("llama")
    with monkeypatch.context() as patched:
        patched.setattr(module, "FORMAT", 7)
        with pytest.raises(InputError, match="checkpoint-4 has format 5, and .* reads format 7: resume with"):
            resumable_checkpoint(run, model)
    (run / "checkpoint-4" / "state.json").write_text('{"step": 4}')
    with pytest.raises(InputError, match="checkpoint-4 has format 0, and .* reads format 5"):
        resumable_checkpoint(run, model)


def test_another_model_is_refused(run):
    for other, said in [
        (small_model("qwen2"), "model_type is llama, and this model's is qwen2"),
        (small_model("llama", tied=False), "tie_word_embeddings is True, and this model's is False"),
    ]:
        before = bits(other, Moments())
        with pytest.raises(InputError, match=f"checkpoint-4 belongs to another model, whose {said}"):
            resumable_checkpoint(run, other)
        assert same(bits(other, Moments()), before)
    torch.nn.Module.register_parameter(model := small_model("llama"), "extra", torch.nn.Parameter(torch.ones(2)))
    with pytest.raises(InputError, match=r"another model, whose extra, here \(2,\), is missing: resume"):
        resumable_checkpoint(run, model)


def test_a_damaged_checkpoint_is_no_model_either(run):
    truncate(run / "checkpoint-4" / "model.safetensors")
    with pytest.raises(InputError, match="run"):
        load_model(str(run))


def test_every_setting_that_differs_is_named_with_both_values(tmp_path):
    """Settings, lists too, are compared through the YAML of the run folder."""
    others = {
        int: 77, float: 0.25, bool: True, "model": "other", "dataset": "seal-tools:x", "dtype": "bfloat16",
        "reward_weights": [1.0, 0.5], "lora_target_modules": ["q_proj", "v_proj"], "reward_funcs": ["mine.reward"],
        "hard_sampling": "add", "demonstrations": "better", "verification": "bold", "prompt_sampling": "dynamic",
        "loss_type": "dapo", "scale_rewards": "none", "advantage_shaping": "difficulty", "old_logprobs": "sampler",
        "importance_sampling_level": "sequence", "importance_sampling_mode": "token_mask", "optim": "adamw_8bit",
        "lr_decay_per": "step", "distinct_examples": False, "eval_on_start": False, "eval_dataset": "builtin",
        "demonstration_dataset": "builtin", "calls": 2, "train_rows": 7, "eval_rows": 7, "delta": 2.0,
        "tool_format": "json", "overlong": "drop", "demonstrate_training_rows": False,
        "retry_with": "hint", "probe_every": 2, "min_reward_std": 0.5, "sft_learning_rate": 0.5,
        "retry_learns": "shown", "rollout_selection": "max-variance", "reward": "similarity", "denominator": "live",
        "chat_template_kwargs": {"enable_thinking": False}, "thoughts": "forbidden",
    }  # fmt: skip
    defaults = ToolExpanderConfig(output_dir=str(tmp_path / "run"))
    RunFolder(tmp_path / "run").start(defaults)
    for field in fields(ToolExpanderConfig):
        value, before = others.get(field.name, others.get(type(field.default))), field.default
        if field.name in (*MAY_DIFFER, "resume"):
            continue
        assert value != before, f"give {field.name} another value"
        beside = {
            "sft_patience": {"sft_fraction": 0.5}, "sft_learning_rate": {"sft_fraction": 0.5},
            "sft_decay": {"sft_coef": 0.5}, "demonstrations": {"hard_sampling": "replace"},
            "importance_sampling_mode": {"hard_sampling": "replace"},
        }  # fmt: skip
        settings = {field.name: value} | beside.get(field.name, {})
        changed = ToolExpanderConfig(output_dir=str(tmp_path / "run"), resume=True, **settings)
        with pytest.raises(InputError) as error:
            RunFolder(tmp_path / "run").check(changed)
        said, _, remedy = str(error.value).partition(": resume with the same")
        assert remedy and "was run with " in said and said.count(", not ") == len(settings)
        assert all(f"{name}={getattr(defaults, name)!r}, not {one!r}" in said for name, one in settings.items())
    two = ToolExpanderConfig(output_dir=str(tmp_path / "run"), resume=True, seed=3, reward_weights=[2])
    with pytest.raises(InputError, match=r"seed=0, not 3, and reward_weights=None, not \[2.0\]: resume"):
        RunFolder(tmp_path / "run").check(two)
    more = ToolExpanderConfig(output_dir=str(tmp_path / "run"), resume=True, max_steps=9, save_total_limit=1)
    RunFolder(tmp_path / "run").check(more)


def test_settings_of_other_versions_count_as_their_defaults(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.start(ToolExpanderConfig(output_dir=str(run.path)))
    settings = run.config()
    del settings["optim"]
    (run.path / "config.yaml").write_text(yaml.safe_dump(settings))
    run.check(ToolExpanderConfig(output_dir=str(run.path), resume=True))
    with pytest.raises(InputError, match="optim='adamw', not 'adamw_8bit'"):
        run.check(ToolExpanderConfig(output_dir=str(run.path), resume=True, optim="adamw_8bit"))
    (run.path / "config.yaml").write_text(yaml.safe_dump(settings | {"momentum": 0.5}))
    with pytest.raises(InputError, match="momentum=0.5, which is not a setting now"):
        run.check(ToolExpanderConfig(output_dir=str(run.path), resume=True))


def test_a_setting_of_inf_is_resumed_as_inf(tmp_path):
    """A bound of inf means none; a checkpoint and the run folder give it back, and tell it from a number."""
    given = {"epsilon_high": float("inf"), "num_iterations": 2, "hard_sampling": "none"}
    config = ToolExpanderConfig(output_dir=str(tmp_path / "run"), **given)
    run, model = RunFolder(tmp_path / "run"), small_model("llama").to(DEVICE)
    run.start(config)
    save(run.path, 1, model, settings=binding_settings(config))
    settings = resumable_checkpoint(run.path, model).state["settings"]
    for before in (settings, run.config()):
        check_same_settings(run.path, before, config)
        with pytest.raises(InputError, match="epsilon_high=inf, not 0.3: resume"):
            check_same_settings(run.path, before, ToolExpanderConfig(**given | {"epsilon_high": 0.3}))


# ---- full disks, read-only and deleted folders


def test_a_disk_without_room_is_noticed_before_anything_is_written(run, monkeypatch):
    model, moments = small_model("llama").to(DEVICE), Moments()
    needed = sum(p.numel() for p in model.parameters()) * 4 + 3000 * 5 + 4 + 30
    before = contents(run)
    usage = shutil.disk_usage(run)

    def free(bytes_):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=bytes_))

    free(needed - 1)
    said = rf"run/checkpoint-6, which needs {needed:,} bytes, could not be written \({needed - 1:,} bytes are free\)"
    with pytest.raises(InputError, match=said + ".*--resume continues from checkpoint-4"):
        save(run, 6, model, moments)
    assert contents(run) == before
    free(needed)
    save(run, 6, model, moments)
    assert [path.name for path in checkpoints(run)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


@contextmanager
def largest_file(size):
    """Inside, the operating system refuses to write more than ``size`` bytes to a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("what", ["model", "tokenizer", "optimizer"])
def test_a_write_that_fails_halfway_leaves_nothing(run, what):
    sizes = {path.stem: path.stat().st_size for path in (run / "checkpoint-4").iterdir()}
    limit, moments = sizes[what] - 1, Moments()
    if what == "tokenizer":
        assert limit < sizes["model"], "so the model is made smaller below"
    model = small_model("llama").to(DEVICE)
    if what == "optimizer":
        moments = Moments(size=sizes["model"])
        limit = sizes["model"] + 1000
    if what == "tokenizer":
        model.resize_token_embeddings(4)
        model.model.layers = model.model.layers[:0]
        model.config.num_hidden_layers = 0
    before = contents(run)
    with largest_file(limit), pytest.raises(InputError, match=r"checkpoint-6, which needs [\d,]+ bytes.*too large"):
        save(run, 6, model, moments)
    assert contents(run) == before and not list(run.glob(".*"))
    assert resumable_checkpoint(run, small_model("llama")).path.name == "checkpoint-4"
    save(run, 6, model, moments)


def test_a_disk_that_fills_up_at_any_sync_leaves_nothing(run, monkeypatch):
    """Some file systems report a full disk only at a sync."""
    before, fsync, failed = contents(run), os.fsync, 0
    while True:
        left = failed + 1

        def full(descriptor):
            nonlocal left
            left -= 1
            if not left:
                raise OSError(28, "No space left on device")
            fsync(descriptor)

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            try:
                save(run, 6)
            except InputError as error:
                assert "(No space left on device)" in str(error)
            else:
                break
        if (run / "checkpoint-6").exists():  # it was complete before the failure
            assert resumable_checkpoint(run, small_model("llama")).path.name == "checkpoint-6"
            shutil.rmtree(run / "checkpoint-6")
        assert contents(run) == before
        failed += 1
    assert failed == len(list((run / "checkpoint-6").iterdir())) + 2, "each file, their folder and the run's"


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    run = RunFolder(tmp_path)
    run.log("data", 0, {})
    kept = run.marks()
    with largest_file(30), pytest.raises(InputError, match="metrics.jsonl could not be written .File too large.: fix"):
        run.log("step", 1, {})
    with largest_file(30), pytest.raises(InputError, match="hard_samples.jsonl could not be written"):
        run.write_hard_samples([{"id": "x" * 100}])
    assert not (tmp_path / "hard_samples.jsonl").exists() and not list(tmp_path.glob("*.part"))
    run.forget_after(kept)
    assert [line["event"] for line in run.metrics()] == ["data"]


def test_a_folder_that_must_not_be_written_to(run):
    """Checked as a user other than root, because permissions do not stop root."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    (folder / "run").mkdir(mode=0o755)
    child = os.fork()
    if not child:
        code = 1
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            else:
                (folder / "run").chmod(0o555)
            with pytest.raises(InputError, match=r"output_dir=.*run: .*run is not writable"):
                RunFolder(folder / "run").check(ToolExpanderConfig(output_dir=str(folder / "run")))
            with pytest.raises(InputError, match="checkpoint-1, .* could not be written .Permission denied"):
                save(folder / "run", 1, small_model("llama"))
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    shutil.rmtree(folder)


def test_a_run_folder_that_is_gone_is_not_made_again(tmp_path):
    gone = RunFolder(tmp_path / "run")
    for write in (
        lambda: save(gone.path, 2), lambda: gone.log("step", 1, {}), lambda: gone.write_hard_samples([]),
        lambda: gone.write_summary({}), lambda: gone.log_rollout(step=1),
    ):  # fmt: skip
        with pytest.raises(InputError, match="run was deleted or moved while the run wrote to it: put it back"):
            write()
    assert not gone.path.exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file is a file, so choose a folder"):
        RunFolder(tmp_path / "file" / "run").check(ToolExpanderConfig())


def test_a_run_whose_folder_is_deleted_says_so(tmp_path):
    def deletes(prompts, completions, completion_ids, **columns):
        if len(completions) == 16:  # of a step, not of a probe
            shutil.rmtree(tmp_path / "run")
        return [1.0] * len(completions)

    with pytest.raises(InputError, match="run was deleted or moved"):
        make_trainer(tmp_path / "run", deletes, cold_start_steps=0, eval_on_start=False).train()
    assert not (tmp_path / "run").exists()


# ---- number of checkpoints kept, and leftovers of killed runs


def test_the_number_kept_holds_whatever_was_interrupted(run, monkeypatch):
    for step in (6, 8):
        save(run, step, keep=9)
    (run / ".checkpoint-10.part").mkdir()
    (run / ".checkpoint-10.part" / "config.json").write_text("{")
    (run / ".checkpoint-1.old").mkdir()
    (run / "checkpoint-8" / "state.json.part").write_text("{")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            module.remove(run / "checkpoint-2")
    assert "checkpoint-2" not in [path.name for path in checkpoints(run)], "half of one is none"
    save(run, 10, keep=2)
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-10", "checkpoint-8"]
    assert not list(run.rglob("*.part"))
    save(run, 12, keep=1, keep_first=True)
    assert [path.name for path in checkpoints(run)] == ["checkpoint-8", "checkpoint-12"]
    assert latest_checkpoint(run).name == "checkpoint-12"


def test_a_start_sweeps_but_leaves_what_is_not_ours(tmp_path):
    config = ToolExpanderConfig(output_dir=str(tmp_path))
    RunFolder(tmp_path).start(config)
    for name in ("config.yaml.part", "summary.json.part", "film.mkv.part"):
        (tmp_path / name).write_text("x")
    (tmp_path / ".checkpoint-3.part").mkdir()
    RunFolder(tmp_path).start(ToolExpanderConfig(output_dir=str(tmp_path), resume=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "film.mkv.part"]


def test_a_log_with_fewer_lines_than_the_checkpoint_counts_is_refused(tmp_path):
    run, kept = RunFolder(tmp_path), []
    for step in range(3):
        run.log("step", step + 1, {})
        run.log_rollout(step=step)
        kept.append(run.marks())
    for name, cut in (("rollouts.jsonl", 4), ("metrics.jsonl", 1)):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-cut])
        before = path.read_bytes(), (tmp_path / "metrics.jsonl").read_bytes()
        with pytest.raises(InputError, match=f"{name} has 2 whole lines, and the checkpoint counts 3: restore"):
            run.forget_after(
                kept[2] | ({} if name == "rollouts.jsonl" else {"rollouts.jsonl": kept[1]["rollouts.jsonl"]})
            )
        assert (path.read_bytes(), (tmp_path / "metrics.jsonl").read_bytes()) == before
    run.forget_after({"metrics.jsonl": kept[1]["metrics.jsonl"], "rollouts.jsonl": kept[0]["rollouts.jsonl"]})
    assert [line["step"] for line in run.metrics()] == [1, 2]
    (tmp_path / "rollouts.jsonl").unlink()
    with pytest.raises(InputError, match="rollouts.jsonl has 0 whole lines, and the checkpoint counts 1"):
        run.forget_after(kept[0])


def test_an_adapter_goes_on_with_its_own_base_alone(tmp_path):
    pytest.importorskip("peft")
    settings = dict(use_peft=True, lora_r=2, cold_start_steps=0, eval_on_start=False)
    make_trainer(tmp_path / "run", max_steps=1, **settings).train()
    trainer = make_trainer(tmp_path / "run", max_steps=2, resume=True, **settings)
    with torch.no_grad():
        next(iter(trainer.model.parameters())).view(-1)[7] += 1e-3
    with pytest.raises(InputError, match="belongs to another model, whose sum of its base's weights is"):
        trainer.train()
    make_trainer(tmp_path / "run", max_steps=2, resume=True, **settings).train()


def test_logs_are_cut_at_lines_and_not_at_other_separators(tmp_path):
    run = RunFolder(tmp_path)
    for number in range(3):
        run.log_rollout(step=number, completion="a\u2028b\x85c\x0cd\re")
    kept = run.marks()
    whole = (tmp_path / LOGS[1]).read_bytes()
    run.log_rollout(step=3)
    with open(tmp_path / LOGS[1], "a") as file:
        file.write('{"step": 4, "torn')
    run.forget_after(kept)
    assert (tmp_path / LOGS[1]).read_bytes() == whole


def test_an_interrupted_replacement_keeps_the_old_file(tmp_path):
    write_atomically(tmp_path / "file", "old")
    with largest_file(10), pytest.raises(OSError):
        write_atomically(tmp_path / "file", "new" * 10)
    assert (tmp_path / "file").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_damaged_line_is_named_before_anything_changes(finished, tmp_path):
    """Except in the table of rows, which is written anew from the checkpoint."""
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    said, kept = "line 2, is damaged: restore the file, or start another run", RunFolder(run).marks()
    for name, damages in {
        "rollouts.jsonl": [b'"text"', b'{"step": 1, "prompt', b"{}{}", b'{"prompt": "\0"}'],
        "metrics.jsonl": [
            b"{",
            b"[1]",
            b"null",
            b'{"event": "step"}',
            b'{"step": 1}',
            b'{"a": "\xff"}',
            b"",
            b"\0\0",
            b"[" * 200_000,
        ],
    }.items():
        whole = (run / name).read_bytes()
        for damage in damages:
            lines = whole.split(b"\n")
            lines[1] = damage
            (run / name).write_bytes(b"\n".join(lines))
            there = contents(run)
            with pytest.raises(InputError, match=f"{name}, {said}"):
                RunFolder(run).forget_after(kept)
            assert contents(run) == there
        if name == "rollouts.jsonl":
            (run / name).write_bytes(whole)
    with pytest.raises(InputError, match=f"metrics.jsonl, {said}"):
        RunFolder(run).metrics()
    trainer = make_trainer(run, resume=True)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(InputError, match=f"metrics.jsonl, {said}"):
        trainer.train()
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())
    assert contents(run) == there
    (run / "metrics.jsonl").write_bytes(whole)
    (run / "hard_samples.jsonl").write_bytes(b"\0")
    trainer._run = trainer._resume  # no more than the start of it
    trainer.train()
    table = [json.loads(line) for line in (run / "hard_samples.jsonl").read_text().splitlines()]
    assert table == trainer.rounds.table.lines() and len(table) == 12


@pytest.mark.parametrize("left", ["metrics.jsonl", "rollouts.jsonl", "hard_samples.jsonl", "summary.json"])
def test_a_run_whose_checkpoints_are_gone_is_not_resumed(finished, tmp_path, left):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", left):
        shutil.copy(finished[0] / name, run)
    there, steps = contents(run), 6 if left == "metrics.jsonl" else 0
    config = ToolExpanderConfig(output_dir=str(run), resume=True, **SMALL).settled(own_rewards=True)
    with pytest.raises(InputError, match=f"run has logged {steps} steps and holds no checkpoint: put its last"):
        RunFolder(run).check(config)
    assert contents(run) == there
    (run / left).unlink()
    early = (finished[0] / "metrics.jsonl").read_text().partition('{"event": "probe"')[0]
    (run / "metrics.jsonl").write_text(early)
    assert {"data", "cold_start", "eval"} <= {line["event"] for line in RunFolder(run).metrics()}
    RunFolder(run).check(config)  # interrupted before its first checkpoint


def test_nothing_is_written_or_deleted_before_all_checks_are_through(finished, tmp_path):
    """So the corrected command runs."""
    with pytest.raises(InputError, match="profile_step=9 is beyond this run of 1 step: choose one of those"):
        make_trainer(tmp_path / "new", profile_step=9, max_steps=1)
    assert not (tmp_path / "new").exists()
    shutil.copytree(finished[0], tmp_path / "run")
    before = contents(tmp_path / "run")
    for settings in ({"overwrite": True}, {"resume": True}):
        with pytest.raises(InputError, match="profile_step=9"):
            make_trainer(tmp_path / "run", profile_step=9, **settings)
    assert contents(tmp_path / "run") == before


def test_other_reward_functions_are_refused_and_both_are_named(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    trainer = make_trainer(run, None, resume=True, min_reward_std=0.0)
    said = r"even_is_good, not no_think_reward: resume with the same \(functions that"
    with pytest.raises(InputError, match=said):
        trainer.train()
    with pytest.raises(InputError, match=r"not even_is_good, first_is_small: resume"):
        make_trainer(run, [even_is_good, first_is_small], resume=True).train()
    assert contents(run) == contents(finished[0])


# ---- whole runs, stopped and resumed


TEN = dict(
    prompts_per_step=3,
    num_generations=3,
    max_completion_length=6,
    probe_rollouts=2,
    cold_start_steps=1,
    num_train_epochs=3,
    max_steps=10,
    save_steps=4,
)
FORMS = {
    "within a round, decay per step": (5, dict(lr_decay_per="step", eval_steps=5)),
    "before a probe, decay per round": (8, dict(eval_steps=4)),
    "add": (5, dict(hard_sampling="add", lr_decay_per="epoch")),
    "dynamic": (5, dict(prompt_sampling="dynamic", num_train_epochs=8)),
    "better demonstrations": (4, dict(demonstrations="better", demonstration_tries=2)),
}


def first_is_small(prompts, completions, completion_ids, **columns):
    """Leaves some groups without a gradient, so that dynamic sampling has something to drop."""
    return [float(ids[0] % 4 == 0) for ids in completion_ids]


SLOW = ("before a probe, decay per round", "add")  # the others hold most of what they do


@pytest.mark.parametrize("form", [pytest.param(form, marks=pytest.mark.soak if form in SLOW else ()) for form in FORMS])
def test_ten_steps_are_five_and_five(tmp_path, form):
    cut, settings = FORMS[form]
    reward = first_is_small if form == "dynamic" else even_is_good
    summary = make_trainer(tmp_path / "whole", reward, **TEN | settings).train()
    stop, step, handlers = Stop(), 0, signal.getsignal(signal.SIGTERM)
    halves = make_trainer(tmp_path / "run", reward, **TEN | settings)
    taken = halves.step

    def stopping():
        nonlocal step
        step += 1
        if step == cut:
            assert signal.getsignal(signal.SIGTERM) is handlers, "a trainer installs nothing"
            stop.handle(signal.SIGTERM, None)
        return taken()

    halves.step = stopping
    with pytest.raises(Stopped):
        halves.train(stop)
    assert latest_checkpoint(tmp_path / "run").name == f"checkpoint-{cut}"
    again = make_trainer(tmp_path / "run", reward, resume=True, **TEN | settings).train()
    assert summary["steps"] == again["steps"] == (10 if form != "dynamic" else summary["steps"]) >= 7
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    of_machine = ("wall_seconds", "peak_memory_bytes", "phases", "memory", "checkpoint")
    assert {k: v for k, v in again.items() if k not in of_machine} == {
        k: v for k, v in summary.items() if k not in of_machine
    }
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    if form == "dynamic":
        assert any(line["dropped"] for line in metrics if line["event"] == "step")


def test_a_checkpoint_of_another_config_or_other_rows_is_refused(tmp_path):
    """For example copied from another run: the folder's config is right, the checkpoint's is not."""
    make_trainer(tmp_path / "one", max_steps=1, cold_start_steps=0).train()
    make_trainer(tmp_path / "two", max_steps=1, cold_start_steps=0, learning_rate=0.5).train()
    shutil.rmtree(tmp_path / "one" / "checkpoint-1")
    shutil.copytree(tmp_path / "two" / "checkpoint-1", tmp_path / "one" / "checkpoint-1")
    trainer = make_trainer(tmp_path / "one", max_steps=2, cold_start_steps=0, resume=True)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(InputError, match="checkpoint-1 was run with learning_rate=0.5, not 0.003: resume"):
        trainer.train()
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())
    trainer = make_trainer(tmp_path / "two", max_steps=2, cold_start_steps=0, learning_rate=0.5, resume=True)
    trainer.task.digests["rows to evaluate on"] = "other"
    with pytest.raises(InputError, match="two was run with other rows to evaluate on: resume with the same"):
        trainer.train()
    assert trainer.rounds.step == 0 and not trainer.learner.optimizer.state_dict()


def test_a_checkpoint_under_another_name_or_beyond_the_run_is_refused(finished, tmp_path):
    """Its weights would be taken for those of another step."""
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    before = contents(run)
    with pytest.raises(InputError, match="max_steps=1 is less than the 6 steps of .*checkpoint-6: allow as many"):
        make_trainer(run, resume=True, max_steps=1).train()
    assert contents(run) == before
    shutil.copytree(latest_checkpoint(run), run / "checkpoint-9")
    before = contents(run)
    with pytest.raises(InputError, match="checkpoint-9 was written at step 6: give it back its name, or remove it"):
        make_trainer(run, resume=True, max_steps=9).train()
    assert contents(run) == before
