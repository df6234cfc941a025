"""The README.md of an exported model: what it is, what it was trained on, how it scored, and how to load it."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from lm2_jax.config import to_dict
from lm2_jax.runs import Run


def model_card(run: Run, workdir: str | os.PathLike[str], origin: Mapping[str, Any], is_plain: bool) -> str:
    """The text of the card.

    Args:
      run: what is exported.
      workdir: of the run; its metrics and evaluations are quoted.
      origin: where the first weights came from; empty for a model that was trained from scratch.
      is_plain: whether the folder is a Hugging Face model.
    """
    model, data = run.config.model, run.config.data
    d = model.decoder
    count = sum(leaf.size for leaf in jax.tree.leaves(run.params))
    memory = "none" if is_plain else f"`{model.memory.kind}`, joined by `{model.join.kind}`"
    start = f"the weights of `{origin['source']}`" if origin.get("source") else "random weights"
    source = json.dumps(to_dict(data.source), ensure_ascii=False)
    lines = [
        "---",
        f"library_name: {'transformers' if is_plain else 'lm2_jax'}",
        "tags: [lm2_jax, recurrent-memory]" if not is_plain else "tags: [lm2_jax]",
        "---",
        "",
        f"# {run.config.name}",
        "",
        f"- {count:,} parameters: {d.num_layers} blocks of width {d.width}, {d.num_heads} query heads and "
        f"{d.num_kv_heads} key/value heads, vocabulary {model.vocab_size:,}",
        f"- Memory: {memory}",
        f"- Attention reaches {model.segment_tokens} tokens, the segment of its training",
        f"- Trained for {run.step:,} of {run.config.optim.steps:,} steps from {start}",
        f"- Training data: `{source}`",
        *_scores(pathlib.Path(workdir)),
        "",
        "## Loading",
        "",
        "```python",
        "import lm2_jax",
        "",
        'pretrained = lm2_jax.from_pretrained("FOLDER")',
        "state = pretrained.model.init_state(batch=1)",
        "tokens = [pretrained.tokenizer.encode(TEXT)]",
        "logits, state = lm2_jax.stream(pretrained.model, pretrained.params, tokens, state)",
        "```",
    ]
    if is_plain:
        lines += ["", "`transformers` loads it too: `AutoModelForCausalLM.from_pretrained(FOLDER)`."]
    return "\n".join(lines) + "\n"


def _scores(workdir: pathlib.Path) -> list[str]:
    """The last held-out metrics, and the files of evaluations, of a run that has them."""
    lines = []
    last = _last_evaluation(workdir / "metrics.jsonl")
    if last:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in sorted(last.items()))
        lines.append(f"- Held-out metrics during training: {shown}")
    return lines or ["- Held-out metrics: none were measured"]


def _last_evaluation(path: pathlib.Path) -> dict[str, float]:
    """Metrics whose names begin with `eval`, of the last line that has any."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            plain = json.loads(line)
        except ValueError:
            continue  # a line that was cut short
        found = {name: value for name, value in plain.items() if name.startswith("eval") and _is_number(value)}
        if found:
            return found | ({"step": plain["step"]} if "step" in plain else {})
    return {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
