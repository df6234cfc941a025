"""Second half of a comparison with `transformers`, run by hand: python check_transformers.py FOLDER OURS.npz

FOLDER is what `export_hf` wrote. OURS.npz holds `tokens` [B, T] and our `logits`, and may hold `prompts` [B, P] and our
greedy `answers` [B, N] (see our_answers.py). Prints differences; fails where a logit differs by more than 1e-4 (1 + its
size), or where perplexity (3 decimals) or greedy text differ.
"""

import sys

import numpy as np
import torch
import transformers


def perplexity(logits: np.ndarray, tokens: np.ndarray) -> float:
    losses = [
        torch.nn.functional.cross_entropy(torch.from_numpy(row[:-1]).double(), torch.from_numpy(ids[1:]).long())
        for row, ids in zip(logits, tokens, strict=True)
    ]
    return float(np.exp(np.mean(losses)))


def main() -> None:
    folder, ours = sys.argv[1], np.load(sys.argv[2])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens, expected = ours["tokens"], ours["logits"]
    with torch.no_grad():
        logits = np.concatenate([model(torch.from_numpy(row[None]).long()).logits.numpy() for row in tokens])
    largest, difference = np.abs(logits).max(), np.abs(logits - expected).max()
    print(f"logits [{tokens.size} tokens]: largest {largest:.3f}, largest difference {difference:.2e}")
    theirs, own = perplexity(logits, tokens), perplexity(expected, tokens)
    print(f"perplexity: transformers {theirs:.5f}, lm2_jax {own:.5f}")
    np.testing.assert_allclose(expected, logits, atol=1e-4, rtol=1e-4)
    assert f"{theirs:.3f}" == f"{own:.3f}"
    if "prompts" in ours:
        answers = ours["answers"]
        prompts = torch.from_numpy(ours["prompts"]).long()
        options = {"max_new_tokens": answers.shape[1], "do_sample": False, "pad_token_id": 0}
        model.generation_config.eos_token_id = None
        out = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
        equal = (out[:, prompts.shape[1] :].numpy() == answers).all(axis=1)
        print(f"greedy text of {answers.shape[1]} tokens: equal for {equal.sum()} of {len(equal)} prompts")
        assert equal.all()


if __name__ == "__main__":
    main()
