"""The main job, end to end on real input: raw files become a Llama that answers over HTTP.

Every step is an ordinary `puna` command, shown as it runs; this file only strings them together, kills the training
half-way with SIGKILL, and gathers the figures into summary.json.
"""

import json
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from puna.console import err
from puna.errors import PunaError, RankFailed, UserError
from puna.llama.shards import write_atomic
from puna.recipe import load
from puna.report import write_report
from puna.train.metrics import append_event, last_steps, read_events

VOCAB_SIZE = 4096
PROBE_STEPS = 48
RESERVE_SECONDS = 105.0  # evaluation before and after, resume, export and its check, serving, report
ONCE = 0.85  # share of the training time that is not spent on steps done twice, starting again and evaluation
PROMPTS = ("def read_lines(path):\n", 'class Queue:\n    """', "import os\nimport ")


def main(directory: Path, minutes: float = 9.0) -> dict[str, Any]:
    """Run the whole job into `directory` within about `minutes`; returns what summary.json holds."""
    started = time.monotonic()
    directory.mkdir(parents=True, exist_ok=True)
    corpus, tokenizer, shards = (directory / "data" / name for name in ("corpus", "tokenizer.json", "shards"))
    err.rule("1. the standard library's source: read, filtered, deduplicated, split")
    _puna("corpus", "build", "--source", "stdlib", "--out", corpus)
    err.rule("2. a byte-level BPE tokenizer and token shards")
    _puna("corpus", "tokenizer", corpus, "--vocab-size", VOCAB_SIZE, "--out", tokenizer)
    _puna("corpus", "tokenize", corpus, "--tokenizer", tokenizer, "--out", shards)
    err.rule("3. training: two processes, killed half-way with SIGKILL, resumed")
    seconds = minutes * 60 - (time.monotonic() - started) - RESERVE_SECONDS
    tokens = _planned_tokens(directory, shards, minutes, seconds)
    train = ["train", "demo", "--run.dir", directory, "--data.path", shards, "--train.tokens", tokens, *_stages(tokens)]
    train += ["--checkpoint.every", max(20, tokens // load("demo").recipe.train.batch_tokens // 8)]
    train += ["--checkpoint.initial", "true"]
    _train_killed_half_way(directory, train, tokens)
    err.rule("4. bits per byte on held-out files, before and after")
    before = _puna("eval", directory, "--step", "0", "--no-baselines", "--json")
    after = _puna("eval", directory, "--baselines", "--json")
    err.rule("5. a Hugging Face folder, compared with transformers token for token")
    shutil.rmtree(directory / "hf", ignore_errors=True)
    export = _puna("export", directory, "--to", "hf", "--out", directory / "hf", "--check", "--json")
    err.rule("6. served over HTTP, asked through the official openai client")
    samples = _ask(directory, PROMPTS)
    err.rule("7. the report")
    summary = _summarise(directory, before, after, export, samples, time.monotonic() - started)
    write_report(directory)
    return summary


def _puna(*words: object) -> Any:
    """Run one puna command, shown; returns what it printed as JSON where --json was among its words."""
    wanted = "--json" in words
    done = subprocess.run(_command(words), stdout=subprocess.PIPE if wanted else sys.stderr, text=True, check=False)
    if done.returncode:
        raise PunaError(f"`puna {_shown(words)}` ended with status {done.returncode}; its own message stands above")
    return json.loads(done.stdout) if wanted else None


def _command(words: tuple[object, ...] | list[object]) -> list[str]:
    err.print(f"[bold]$ puna {_shown(words)}[/bold]")
    return [sys.executable, "-m", "puna.cli", *map(str, words)]


def _shown(words: tuple[object, ...] | list[object]) -> str:
    return shlex.join(map(str, words))


def _planned_tokens(directory: Path, shards: Path, minutes: float, seconds: float) -> int:
    """Tokens to train on: those of an earlier start in this directory, which goes on, or what `seconds` afford.

    Raises UserError where the directory holds a job of another length, or a run that is no demo.
    """
    plan = directory / "demo.json"
    if plan.is_file():
        kept = json.loads(plan.read_text())
        if kept["minutes"] != minutes:
            raise UserError(
                f"{directory} holds a demo of {kept['minutes']:g} minutes, not {minutes:g}",
                "Give the same --minutes to go on with it, or another --dir.",
            )
        return kept["tokens"]
    if (directory / "checkpoints").exists():
        raise UserError(f"{directory} holds a run that is no demo", "Give another folder with --dir.")
    tokens = _affordable_tokens(directory, shards, seconds)
    _write_json(plan, {"minutes": minutes, "tokens": tokens})
    return tokens


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_atomic(path, (json.dumps(values, indent=2) + "\n").encode())


def _affordable_tokens(directory: Path, shards: Path, seconds: float) -> int:
    """Tokens that training can do in `seconds`, by the rate of a short run."""
    probe = directory / "probe"
    tokens = PROBE_STEPS * load("demo").recipe.train.batch_tokens
    words = ["train", "demo", "--run.dir", probe, "--data.path", shards, "--run.tensorboard", "false"]
    words += ["--eval.every", 0, "--eval.tokens", 0, "--train.tokens", tokens, *_stages(tokens)]
    _puna(*words)
    steps = list(last_steps(read_events(probe)).values())
    timed = steps[len(steps) // 4 :]
    rate = (timed[-1]["tokens"] - steps[len(steps) // 4 - 1]["tokens"]) / sum(
        step["step_s"] + step["data_wait_s"] for step in timed
    )
    affordable = max(4 * tokens, int(max(seconds, 0.0) * rate * ONCE))
    err.print(f"{rate:,.0f} tokens/s: {affordable:,} tokens in {max(seconds, 0.0):.0f} s")
    return affordable


def _stages(tokens: int) -> list[object]:
    """Flags that stretch the recipe's stages to a run of `tokens`."""
    recipe = load("demo").recipe
    words: list[object] = []
    for name in ("batch_stages", "seq_stages"):
        pairs = getattr(recipe.schedule, name)
        stretched = [[int(start * tokens / recipe.train.tokens), size] for start, size in pairs]
        words += [f"--schedule.{name}", stretched]
    return words


def _train_killed_half_way(directory: Path, words: list[object], tokens: int) -> None:
    process = subprocess.Popen(_command(words), stdout=sys.stderr)
    while process.poll() is None and not _past_half(directory, tokens):
        time.sleep(0.2)
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
        process.wait()
        err.print("[red]killed with SIGKILL[/red]; the same command again resumes:")
    elif process.returncode:
        raise RankFailed(f"`puna {_shown(words)}` ended with status {process.returncode}; its own message stands above")
    _puna(*words)


def _past_half(directory: Path, tokens: int) -> bool:
    """Half of the tokens are trained, and some steps since the newest checkpoint, so that a resume repeats them."""
    events = read_events(directory)
    steps = [event for event in events if event["event"] == "step"]
    saved = [event["step"] for event in events if event["event"] == "checkpoint"]
    return bool(steps and saved and steps[-1]["tokens"] > tokens / 2 and steps[-1]["step"] >= max(saved) + 5)


def resume_max_abs_loss_diff(directory: Path) -> float | None:
    """Largest difference between the losses of steps done twice, before a kill and after the resume; None: none was."""
    seen: dict[int, float] = {}
    differences = []
    for event in read_events(directory):
        if event["event"] == "step":
            if event["step"] in seen:
                differences.append(abs(event["loss"] - seen[event["step"]]))
            seen[event["step"]] = event["loss"]
    return max(differences, default=None)


@contextmanager
def _server(directory: Path, port: int):
    process = subprocess.Popen(_command(["serve", directory, "--port", port, "--name", "demo"]), stdout=sys.stderr)
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise PunaError(f"the server ended with status {process.returncode}; its own message stands above")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def _ask(directory: Path, prompts: tuple[str, ...]) -> list[dict[str, str]]:
    """Completions of `prompts` from a server of `directory`, through the openai client; kept for the report too."""
    from openai import OpenAI

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    samples = []
    with _server(directory, port) as url:
        client = OpenAI(base_url=url, api_key="unused")
        for prompt in prompts:
            answer = client.completions.create(model="demo", prompt=prompt, max_tokens=96, temperature=0.7, seed=0)
            samples.append({"prompt": prompt, "completion": answer.choices[0].text})
            err.print(prompt + answer.choices[0].text, markup=False)
            append_event(directory, {"event": "sample", **samples[-1]})
    return samples


def _summarise(
    directory: Path, before: dict, after: dict, export: dict, samples: list[dict[str, str]], seconds: float
) -> dict[str, Any]:
    steps = last_steps(read_events(directory))
    last = steps[max(steps)]
    summary = {
        "steps": last["step"],
        "tokens": last["tokens"],
        "train_tokens_per_s": statistics.median(event["tokens_per_s"] for event in steps.values()),
        "bits_per_byte_before": before["bits_per_byte"],
        "bits_per_byte_after": after["bits_per_byte"],
        "gzip_bits_per_byte": after["gzip_bits_per_byte"],
        "xz_bits_per_byte": after["xz_bits_per_byte"],
        "ngram_bits_per_byte": after["ngram_bits_per_byte"],
        "resume_max_abs_loss_diff": resume_max_abs_loss_diff(directory),
        "hf_logits_max_abs_diff": export["hf_logits_max_abs_diff"],
        "hf_greedy_identical": export["hf_greedy_identical"],
        "served_completion": samples[0]["completion"],
        "seconds": seconds,
    }
    _write_json(directory / "summary.json", summary)
    return summary
