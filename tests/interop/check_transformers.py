"""Second half of a comparison with `transformers`, run by hand: python check_transformers.py FOLDER...

Each folder has `hf`, which `export_hf` wrote, and `ours.npz`: `tokens` [B, T] and our `logits`; it may hold `prompts`
[B, P] with our greedy `answers` [B, N] (our_answers.py), and `logits64`, ours in float64, whose last row is compared.
Prints differences; fails where a logit differs by more than 1e-4 (1 + its size), or where perplexity (3 decimals) or
greedy text differ. With `logits64`, those must agree to 1e-9, and the bound in float32 is for RoPE frequencies that are
computed in float64 on both sides: `transformers` computes its own in float32, which alone can move a logit of a real
model by 1e-4.
"""

import pathlib
import sys
import types

import numpy as np
import torch
import transformers


class Rotary(torch.nn.Module):
    """RoPE without scaling whose angles are computed in a type: `transformers` has float32, whatever the model's is."""

    def __init__(self, config: transformers.PreTrainedConfig, angles: torch.dtype, out: torch.dtype):
        super().__init__()
        assert config.rope_parameters["rope_type"] == "default"
        pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
        self.frequencies, self.out = (config.rope_parameters["rope_theta"] ** -pairs).to(angles), out

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angle = position_ids[..., None].to(self.frequencies.dtype) * self.frequencies
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos().to(self.out), angle.sin().to(self.out)


def logits_of(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return np.concatenate([model(torch.from_numpy(row[None]).long()).logits.numpy() for row in tokens])


def perplexity(logits: np.ndarray, tokens: np.ndarray) -> float:
    losses = [
        torch.nn.functional.cross_entropy(torch.from_numpy(row[:-1]).double(), torch.from_numpy(ids[1:]).long())
        for row, ids in zip(logits, tokens, strict=True)
    ]
    return float(np.exp(np.mean(losses)))


def compare_greedy(model: torch.nn.Module, prompts: np.ndarray, answers: np.ndarray) -> None:
    ids = torch.from_numpy(prompts).long()
    options = {"max_new_tokens": answers.shape[1], "do_sample": False, "pad_token_id": 0}
    model.generation_config.eos_token_id = None
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    equal = (out[:, ids.shape[1] :].numpy() == answers).all(axis=1)
    print(f"greedy text of {answers.shape[1]} tokens: equal for {equal.sum()} of {len(equal)} prompts")
    assert equal.all()


def norm(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """RMSNorm in the type of the model; that of `transformers` computes in float32, also in a float64 model."""
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def compare_with_float64(
    model: torch.nn.Module, tokens: np.ndarray, theirs: np.ndarray, ours: np.ndarray, ours64: np.ndarray
) -> None:
    """The distance of both sides from the same weights in float64, and what RoPE's angles in float32 add to it."""
    own = model.model.rotary_emb
    norms = [module for name, module in model.named_modules() if name.endswith("norm")]

    def run(dtype: torch.dtype, angles: torch.dtype | None) -> np.ndarray:
        model.to(dtype)
        model.model.rotary_emb = own if angles is None else Rotary(model.config, angles, dtype)
        for module in norms:
            module.forward = types.MethodType(norm if dtype == torch.float64 else type(module).forward, module)
        return logits_of(model, tokens)

    def show(name: str, logits: np.ndarray, reference: np.ndarray) -> None:
        distance = logits - reference
        print(f"  {np.abs(distance).max():.2e}  {np.sqrt(np.mean(distance**2)):.2e}  {name}", flush=True)

    print("distance: largest, root mean square")
    exact = run(torch.float64, torch.float64)
    show("lm2_jax, float64 - transformers, float64 everywhere", ours64, exact)
    show("lm2_jax, float32 - transformers, float64 everywhere", ours, exact)
    show("transformers, float32 - transformers, float64 everywhere", theirs, exact)
    show("transformers, float64 with its own angles in float32 - the same", run(torch.float64, None), exact)
    show("transformers, float32 with angles in float64 - the same", run(torch.float32, torch.float64), exact)
    show("lm2_jax - transformers, both float32", ours, theirs)
    rounded = run(torch.float32, torch.float32)
    show("lm2_jax - transformers with frequencies computed in float64 and rounded, both float32", ours, rounded)
    np.testing.assert_allclose(ours64, exact, atol=1e-9, rtol=1e-9)
    np.testing.assert_allclose(ours, rounded, atol=1e-4, rtol=1e-4)


def compare(folder: pathlib.Path) -> None:
    ours = np.load(folder / "ours.npz")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()
    tokens, expected = ours["tokens"], ours["logits"]
    logits = logits_of(model, tokens)
    largest, difference = np.abs(logits).max(), np.abs(logits - expected).max()
    rope = getattr(model.config, "rope_parameters", {})  # GPT-2 has none
    print(f"{folder.name}: {type(model).__name__}, RoPE {rope.get('rope_type')}")
    print(f"logits [{tokens.size} tokens]: largest {largest:.3f}, largest difference {difference:.2e}")
    theirs, own = perplexity(logits, tokens), perplexity(expected, tokens)
    print(f"perplexity: transformers {theirs:.5f}, lm2_jax {own:.5f}")
    assert abs(theirs - own) < 5e-4
    if "prompts" in ours:
        compare_greedy(model, ours["prompts"], ours["answers"])
    if "logits64" in ours:
        compare_with_float64(model, tokens[-1:], logits[-1:], expected[-1:], ours["logits64"][-1:])
    else:
        np.testing.assert_allclose(expected, logits, atol=1e-4, rtol=1e-4)


def main() -> None:
    for folder in sys.argv[1:]:
        compare(pathlib.Path(folder))


if __name__ == "__main__":
    main()
