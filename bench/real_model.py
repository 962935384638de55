"""A pretrained checkpoint on the whole road: `pt`, `sft` and `sft` with LoRA, each for a few steps, and what they leave.

    python bench/real_model.py --model FOLDER --text texts/ --dialogues mine.jsonl --steps 6

For each of the three it checks that the held-out loss falls, that the folder opens with `AutoModelForCausalLM` and gives
danlu's own log-probabilities, that the template and the tokens that end a turn are the original's, and, with LoRA, that
the merged weights are base + adapter. Without data it takes the documentation of a few modules and chatterbot-corpus.
Prints one line per check; ends with code 1 where one fails.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from danlu.core.examples import Branch, Example
from danlu.models.generate import stop_ids_of
from danlu.models.load import load_model

TEXT, DIALOGUES = "docstrings:json,email,logging", "package:chatterbot_corpus/data/english"
SAMPLE = "The 三国演义 has 120 chapters. 滚滚长江东逝水, and so on."


def train(stage: str, name: str, options: argparse.Namespace, folder: Path, *settings: str) -> tuple[Path, dict]:
    """One `danlu pt` or `danlu sft`; the artifact's folder and its metrics."""
    data = options.text if stage == "pt" else options.dialogues
    command = [sys.executable, "-m", "danlu.cli", stage, "--model", options.model, "--dataset", data, "--runs",
               str(folder), "--name", name]
    for setting in (f"max_steps={options.steps}", "global_batch_size=4", "cutoff_len=128", "max_samples=200",
                    "val_size=0.1", f"eval_steps={options.steps}", "warmup_steps=1", *settings):
        command += ["--set", setting]
    subprocess.run(command, check=True)
    step = folder / name / stage
    artifact = step / (step / "current").read_text().strip()
    return artifact, json.loads((artifact / "manifest.json").read_text())["metrics"]


def check_folder(artifact: Path, model: str) -> list[tuple[str, bool, str]]:
    """(what, whether it is so, figures) of a saved folder."""
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(artifact), AutoTokenizer.from_pretrained(artifact)
    original = AutoTokenizer.from_pretrained(model)
    ids = torch.tensor([tokenizer(SAMPLE)["input_ids"]])
    own = load_model(artifact).root.eval()
    with torch.no_grad():
        plain = lm(ids).logits.float().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        found = own(own.batch([Example([], (Branch(ids[0].numpy()),))])).logprobs_S
    difference = float((plain - found).abs().max())
    before = GenerationConfig.from_pretrained(model).eos_token_id
    wanted = set(before if isinstance(before, list) else [before]) - {None}
    return [("log-probabilities of transformers", difference < 1e-3, f"largest difference {difference:.1e}"),
            ("template", tokenizer.chat_template == original.chat_template, ""),
            ("end of turn", wanted <= set(stop_ids_of(lm)) and tokenizer.eos_token == original.eos_token,
             f"{stop_ids_of(lm)} {tokenizer.eos_token}")]


def check_merge(artifact: Path, model: str) -> tuple[str, bool, str]:
    """Whether the merged folder is base + adapter."""
    ids = torch.tensor([AutoTokenizer.from_pretrained(model)(SAMPLE)["input_ids"]])
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), artifact / "adapter")(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(artifact)(ids).logits
    difference = float((adapted - merged).abs().max() / adapted.abs().max())
    return "merged = base + adapter", difference < 1e-3, f"largest difference {difference:.1e} of the largest logit"


def main() -> None:
    """Trains, checks and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", default=TEXT)
    parser.add_argument("--dialogues", default=DIALOGUES)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for stage, name, *settings in (("pt", "pt", "learning_rate=1e-4"), ("sft", "sft", "learning_rate=5e-5"),
                                       ("sft", "lora", "learning_rate=5e-4", "finetuning_type=lora")):
            artifact, metrics = train(stage, name, options, Path(folder), *settings)
            before, after = metrics["eval_loss_before"], metrics["eval_loss"]
            found = [("held-out loss falls", after < before, f"{before:.3f} → {after:.3f}")]
            found += check_folder(artifact, options.model)
            if name == "lora":
                found.append(check_merge(artifact, options.model))
            for what, well, figures in found:
                print(f"{'ok  ' if well else 'FAIL'} {name}: {what}  {figures}", flush=True)
                failed = failed or not well
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
