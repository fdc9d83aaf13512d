"""The monitor under Hugging Face's Trainer and in a plain loop: the same records, the same page."""

import itertools
import os
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from puna.diagnosis.page import page
from puna.diagnosis.records import watched
from puna.diagnosis.words import diagnose
from puna.report import read_events
from puna.train.config import HealthConfig

pytest.importorskip("accelerate", reason="Hugging Face's Trainer needs accelerate, which is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

STEPS, BATCH, LENGTH, RATE = 120, 4, 32, 2e-2
STALL = range(80)  # forward passes of training in which the embedding's gradient is nearly zero


class Text(IterableDataset):
    """Bytes of the standard library's source, always in the same order."""

    def __iter__(self):
        data = torch.frombuffer(bytearray(Path(os.__file__).read_bytes()), dtype=torch.uint8).long()
        for row in data[: STEPS * BATCH * LENGTH].view(-1, LENGTH):
            yield {"input_ids": row, "labels": row}


def stalling(model, first):
    """Give the model's first layers no gradient worth the name for a while, and then all of it at once.

    first: number of the first forward pass.
    """
    passes = itertools.count(first)
    now = 0

    def begin(module, inputs):
        nonlocal now
        now = next(passes)

    model.register_forward_pre_hook(begin)
    for name, parameter in model.named_parameters():
        if name.startswith(("model.embed_tokens", "model.layers.0.")):
            parameter.register_hook(lambda gradient: gradient * 1e-9 if now in STALL else gradient)
    return model


def model_and_optimizer(first=0):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=LENGTH,
    )  # fmt: skip
    model = stalling(transformers.LlamaForCausalLM(config).train(), first)
    return model, torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.999), weight_decay=0.0)


def plain_loop(folder: Path):
    """A loop of one's own; three added lines."""
    from puna.train.health import HealthMonitor  # 1

    model, optimizer = model_and_optimizer()
    monitor = HealthMonitor(optimizer, model, folder=folder)  # 2
    for batch in DataLoader(Text(), batch_size=BATCH):
        loss = model(**batch, num_items_in_batch=BATCH * (LENGTH - 1)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        monitor.loss(loss)  # 3
        optimizer.step()
        optimizer.zero_grad()
    return model, monitor


def trainer_for(folder: Path, first=0, **settings):
    model, optimizer = model_and_optimizer(first)
    known = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": BATCH, "max_grad_norm": 1.0,
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no",
        "dataloader_pin_memory": False,
    }  # fmt: skip
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    arguments = transformers.TrainingArguments(**known | settings)
    return transformers.Trainer(model, arguments, train_dataset=Text(), optimizers=(optimizer, constant))


def hugging_face(folder: Path, trainer_folder: Path) -> torch.nn.Module:
    """The same work under the Trainer; three added lines."""
    from puna.train.callbacks.hugging_face import HealthCallback  # 1

    trainer = trainer_for(trainer_folder)
    health = HealthCallback(trainer, folder)  # 2
    trainer.add_callback(health)  # 3
    trainer.train()
    return trainer.model


def page_of(folder: Path) -> str:
    problems: list[str] = []
    found = watched(read_events(folder / "events.jsonl", problems))
    return page("a run", found, diagnose(found, problems))


def test_trainer_and_plain_loop_give_the_same_page(tmp_path):
    model, monitor = plain_loop(tmp_path / "plain")
    shown = page_of(tmp_path / "plain")
    monitor.close()  # as the end of the process would
    plain = model.state_dict()
    trained = hugging_face(tmp_path / "hf", tmp_path / "out").state_dict()
    assert all(torch.equal(plain[name], trained[name]) for name in plain)
    assert page_of(tmp_path / "hf") == shown
    found = watched(read_events(tmp_path / "hf" / "events.jsonl", []))
    assert found.state == "alarm"


class Seen(transformers.TrainerCallback):
    """What each optimiser step began with: weights, and the rate that it is about to use."""

    def __init__(self):
        self.weights, self.rates = {}, {}

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.weights[state.global_step + 1] = kwargs["model"].lm_head.weight.detach().clone()

    def watch(self, optimizer, first):
        steps = itertools.count(first)
        optimizer.register_step_pre_hook(lambda opt, *_: self.rates.update({next(steps): opt.param_groups[0]["lr"]}))


def acting(folder: Path, trainer, **settings):
    from puna.train.callbacks.hugging_face import HealthCallback

    health = HealthCallback(trainer, folder, HealthConfig(act=True, record_every=10, **settings))
    seen = Seen()
    trainer.add_callback(health)
    trainer.add_callback(seen)
    return health, seen


def disturb(model, change):
    """Pass the loss of each forward pass (1: the first) through `change(pass, loss)`."""
    passes = itertools.count(1)

    def hook(module, inputs, output):
        output.loss = change(next(passes), output.loss)

    model.register_forward_hook(hook)


def actions(folder: Path) -> list[tuple[int, str]]:
    events = read_events(folder / "events.jsonl", [])
    return [(event["step"], event["action"]) for event in events if event["event"] == "health_action"]


def test_a_bad_batch_is_skipped(tmp_path):
    trainer = trainer_for(tmp_path / "out", max_steps=45, learning_rate=1e-3)
    health, seen = acting(tmp_path / "health", trainer)
    disturb(trainer.model, lambda step, loss: loss * (100 if step == 40 else 1))
    trainer.train()
    assert [step for step, _ in actions(tmp_path / "health")] == [40]
    changed = [step for step in range(2, 46) if not torch.equal(seen.weights[step - 1], seen.weights[step])]
    assert changed == [step for step in range(2, 46) if step != 40]
    state = next(iter(trainer.optimizer.optimizer.state.values()))
    assert state["step"] == 44
    assert health.stopped == ""


@pytest.mark.slow
def test_a_spike_stops_the_training_and_it_goes_on_from_before(tmp_path):
    settings = {"wait": 4, "margin": 5, "good_after": 5, "recover": 20}
    trainer = trainer_for(tmp_path / "out", max_steps=80, save_strategy="steps", save_steps=10)
    health, seen = acting(tmp_path / "health", trainer, **settings)
    disturb(trainer.model, lambda step, loss: loss + (9 if step >= 50 else 0))
    trainer.train()
    assert 53 < trainer.state.global_step < 75
    assert "Go on with trainer.train(resume_from_checkpoint=" in health.stopped
    folder = Path(health.stopped.partition('"')[2].partition('"')[0])
    assert folder.name in ("checkpoint-30", "checkpoint-40")
    assert "training_step" not in vars(trainer)

    again = trainer_for(tmp_path / "out", max_steps=80)
    _, seen = acting(tmp_path / "health", again, **settings)
    first = int(folder.name.rpartition("-")[2]) + 1
    seen.watch(again.optimizer, first)
    again.train(resume_from_checkpoint=str(folder))
    assert again.state.global_step == 80
    assert seen.rates[first + 5] == pytest.approx(0.7 * RATE)
    assert seen.rates[first + 5] < seen.rates[79] < seen.rates[80] <= RATE  # on the way back
    assert again.optimizer.param_groups[0]["lr"] == RATE


@pytest.mark.slow
def test_a_resumed_training_has_the_records_of_one_that_was_not_interrupted(tmp_path):
    from puna.train.callbacks.hugging_face import HealthCallback

    def train(folder, output, first=0, **resume):
        trainer = trainer_for(output, first, max_steps=90, save_strategy="steps", save_steps=50)
        trainer.add_callback(HealthCallback(trainer, folder, HealthConfig(record_every=5)))
        trainer.train(**resume)
        return [
            {key: value for key, value in event.items() if key != "time"}
            for event in read_events(folder / "events.jsonl", [])
            if event["event"] != "health_start" and event["step"] > 50
        ]

    whole = train(tmp_path / "whole", tmp_path / "out")
    resumed = train(
        tmp_path / "resumed", tmp_path / "out", 50, resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-50")
    )
    assert len(whole) > 10
    assert resumed == whole
