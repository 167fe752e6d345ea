"""The examples, run as a user runs them but within this process: what they print and what they leave."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import toolx_kernels
from toolx_kernels.toolcall import HERMES, parse_calls
from toolx_kernels.train import reporter

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs an example in an empty folder; gives its names and the lines that it printed."""
    monkeypatch.chdir(tmp_path)
    # the picture of a run takes as long as the rest of it
    monkeypatch.setattr(reporter, "write_curves", lambda run, model: (run / "curves.png").write_bytes(b""))

    def run(name):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            names = runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return names, capsys.readouterr().out.splitlines()

    return run


def rewards_of(lines):
    (line,) = (line for line in lines if line.startswith("mean reward:"))
    return [float(word) for word in line.split(":")[1].split()]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_and_explains_itself(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 62
    assert f"python examples/{path.name}   # " in text.split('"""')[1]
    assert re.search(r'^MODEL.* = "tiny".*# .*for a real model: "Qwen/Qwen2.5-0.5B-Instruct"', text, re.MULTILINE)
    imported = set(re.findall(r"^from (toolx_kernels[\w.]*) import", text, re.MULTILINE))
    assert imported <= {"toolx_kernels", "toolx_kernels.toolcall"}, "public names alone"
    assert f"| [{path.name}]({path.name}) |" in (EXAMPLES / "README.md").read_text()


def test_the_loss_in_a_training_loop_of_ones_own(run, monkeypatch):
    """The reward rises, and the first log-probs are those of each prompt and completion alone, without padding."""
    calls, loss = [], toolx_kernels.linear_grpo_loss

    def first_checked(hidden, weight, targets, *, cu_seqlens, old_logprobs, **given):
        out = loss(hidden, weight, targets, cu_seqlens=cu_seqlens, old_logprobs=old_logprobs, **given)
        calls.append(old_logprobs)
        if len(calls) == 1:
            model, tokenizer = toolx_kernels.load_model("tiny")
            for b, question in ((3, "Tell me a number."), (20, "How much is it?")):
                rows = slice(cu_seqlens[b], cu_seqlens[b + 1])
                messages = [{"role": "user", "content": question}]
                prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
                with torch.no_grad():
                    logits = model(torch.tensor([[*prompt, *targets[rows]]])).logits[0, len(prompt) - 1 : -1]
                expected = logits.log_softmax(-1).gather(1, targets[rows, None])[:, 0]
                torch.testing.assert_close(out.logprobs[rows], expected, atol=1e-4, rtol=0)
        return out

    monkeypatch.setattr(toolx_kernels, "linear_grpo_loss", first_checked)
    names, lines = run("loss_in_your_trainer.py")
    rewards = [float(line.split()[-1]) for line in lines]
    assert len(rewards) == names["STEPS"] and rewards[-1] > 1.5 * rewards[0]
    assert [old is None for old in calls] == [True, False] * names["STEPS"]


def test_rollouts(run):
    names, lines = run("rollouts.py")
    described = [re.match(r"  (\w+), (\d+) tokens, log-prob -[\d.]+: ", line) for line in lines]
    assert [line[1] for line in described if line].count("stop") > 0
    assert len([line for line in described if line]) == 8
    *_, difference, saved = lines
    assert float(difference.split()[-1]) < 1e-4
    left, whole = map(int, re.findall(r"\d+", saved))
    assert left < whole
    for some, all in zip(names["left"], names["whole"], strict=True):
        assert {one.finish_reason for one in some.completions} == {"stop", "cancelled"}
        for one, other in zip(some.completions, all.completions, strict=True):
            assert one.ids == other.ids[: len(one.ids)]


def test_a_reward_of_ones_own(run, tmp_path):
    names, lines = run("own_reward.py")
    rewards = rewards_of(lines)
    assert len(rewards) == 6 and sum(rewards[-2:]) / 2 > rewards[0] + 0.1
    assert len(names["DATA"].read_text().splitlines()) == 12
    assert parse_calls("\n".join(lines)) == [{"name": "book", "arguments": {"item": "tour", "insured": True}}]
    summary = json.loads((tmp_path / "runs" / "own-reward" / "summary.json").read_text())
    assert (summary["eval_rows"], summary["eval_after"]) == (0, None) and (tmp_path / summary["checkpoint"]).is_dir()
    reward = names["prefer_insured"]
    texts = [HERMES.render(names["booking"]("car", insured)) for insured in (True, False)]
    assert reward([], [*texts, "no call"], [], item=["car"] * 3) == [1.0, 0.5, 0.0]
    assert reward([], texts, [], item=["boat"] * 2) == [0.0, 0.0]


def test_tools_in_turns(run):
    names, lines = run("tools_in_turns.py")
    rewards = rewards_of(lines)
    assert len(rewards) == 6 and sum(rewards[-2:]) / 2 > rewards[0] + 0.05
    (call,) = parse_calls("\n".join(lines))
    assert call["name"] == "rate" and lines[-1] == str(names["RATES"][call["arguments"]["item"]])


def test_lora(run, tmp_path):
    """The merged model is the adapter on its base, in files that know nothing of adapters."""
    pytest.importorskip("peft")
    names, lines = run("lora.py")
    rewards = rewards_of(lines)
    assert len(rewards) == 8 and max(rewards[-2:]) > 1.3 * rewards[0]
    assert float(re.match("merged: mean reward ([\\d.]+)", lines[-1])[1]) > 1.3 * rewards[0]
    assert not list((tmp_path / "runs" / "lora-merged").glob("adapter*"))
    adapted, tokenizer = toolx_kernels.load_model(names["summary"]["checkpoint"])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "lora-merged")
    ids = torch.tensor([tokenizer.encode("Tell me a number.")])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-4, rtol=1e-4)
        base, _ = toolx_kernels.load_model("tiny")
        assert (merged(ids).logits - base(ids).logits).abs().max() > 0.1
