"""Compares an exported folder with `transformers`; not run in CI: python check_transformers.py FOLDER OURS.npz

OURS.npz holds `tokens` [B, T] and our `logits`. Prints the largest difference and the perplexities.
"""

import sys

import numpy as np
import torch
import transformers


def main() -> None:
    folder, ours = sys.argv[1], np.load(sys.argv[2])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(ours["tokens"].astype(np.int64))).logits.numpy()
    print("largest logit", np.abs(logits).max(), "largest difference", np.abs(logits - ours["logits"]).max())
    for name, values in (("transformers", logits), ("lm2_jax", ours["logits"])):
        scores = torch.log_softmax(torch.from_numpy(values[:, :-1].astype(np.float64)), -1).numpy()
        picked = np.take_along_axis(scores, ours["tokens"][:, 1:, None].astype(np.int64), -1)
        print(name, "perplexity", float(np.exp(-picked.mean())))
    if "prompts" in ours:
        equal = 0
        for prompt, answer in zip(ours["prompts"], ours["answers"], strict=True):
            ids = torch.from_numpy(prompt.astype(np.int64))[None]
            out = model.generate(ids, max_new_tokens=len(answer), do_sample=False, eos_token_id=None, pad_token_id=0)
            equal += out[0, len(prompt) :].numpy().tolist() == answer.tolist()
        print(f"greedy text equal for {equal} of {len(ours['prompts'])} prompts")


if __name__ == "__main__":
    main()
