"""Writes some of tests/parity/golden/*.npz by running other projects' code: see golden/README.md.

    python tests/parity/make_golden.py lm2 CLONE_OF_LM2
    python tests/parity/make_golden.py titans CLONE_OF_TITANS_PYTORCH
    python tests/parity/make_golden.py ttt CLONE_OF_TTT_LM_PYTORCH
    python tests/parity/make_golden.py hmt CLONE_OF_HMT_PYTORCH
    python tests/parity/make_golden.py rmt_gpt2 CLONE_OF_RECURRENT_MEMORY_TRANSFORMER
    python tests/parity/make_golden.py armt_gpt2 CLONE_OF_ASSOCIATIVE_RECURRENT_MEMORY_TRANSFORMER

Needs torch and what the clone needs, which no test needs. Nothing of a clone becomes part of this repository.
"""

import os
import pathlib
import sys
import types

import numpy as np
import torch
from torch import nn

GOLDEN = pathlib.Path(__file__).parent / "golden"


def randomise(module, scale=0.4, bias=0.3):
    """Larger weights than a start has, so that errors show."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if ("norm" in name or "ln_" in name) and name.endswith("weight"):
                p.copy_(1 + 0.2 * torch.randn_like(p))
            elif p.ndim == 0:
                p.add_(0.5 * torch.randn_like(p))
            elif name.endswith("bias"):
                p.copy_(bias * torch.randn_like(p))
            elif "embed_tokens" in name:
                p.copy_(0.5 * torch.randn_like(p))
            elif name.endswith("projector.w"):
                p.copy_(torch.randn_like(p))
            else:
                p.copy_(scale * torch.randn_like(p))


def arrays(start, parameters):
    return {f"{start}{name}": p.detach().numpy() for name, p in parameters}


def lm2():
    """The released model over two calls, and its memory module with top-k alone."""
    os.environ["RANK"] = "0"
    torch.Tensor.cuda = lambda self, *args, **options: self  # the module asks for a GPU at its construction
    from src.memory import MemoryModule
    from src.model_memory_llama import CustomLlamaConfig, LlamaMem

    torch.manual_seed(3)
    size = 16
    config = CustomLlamaConfig(
        vocab_size=40, hidden_size=size, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=10000.0,
        tie_word_embeddings=True, use_memory=True, memory_slots=size, num_mem_heads=2, batch_size=2,
        attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaMem.from_config(config, types.SimpleNamespace(pad_token_id=0)).eval()
    randomise(model)
    tokens = torch.randint(0, 40, (2, 2 * size))
    with torch.no_grad():
        calls = [model(part) for part in tokens.split(size, dim=1)]
    out = {"tokens": tokens.numpy().astype(np.int32), **arrays("weights/", model.named_parameters())}
    out["logits"] = torch.cat([logits for logits, _, _ in calls], dim=1).numpy()
    out["banks"] = torch.stack([bank for _, _, bank in calls]).numpy()
    module = MemoryModule(mem_slots=size, head_size=4, hidden_dim=size, num_heads=4, use_topk=True, topk=3).eval()
    randomise(module)
    x, bank = torch.randn(2, size, size), torch.randn(2, size, size)
    with torch.no_grad():
        y, new = module(x, bank, None)
    found = {"x": x, "bank": bank, "y": y, "new": new}
    return out | arrays("topk/", found.items()) | arrays("topk/weights/", module.named_parameters())


class TanhMlp(nn.Module):
    """Passed to NeuralMemory as its `model`: two layers and gelu's tanh formula."""

    def __init__(self, dim, expansion):
        super().__init__()
        shapes = ((dim, dim * expansion), (dim * expansion, dim))
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])

    def forward(self, x):
        return nn.functional.gelu(x @ self.weights[0], approximate="tanh") @ self.weights[1]


def titans():
    """NeuralMemory over twelve tokens, in several configurations."""
    package = types.ModuleType("titans_pytorch")  # without the rest of the package and its requirements
    package.__path__ = [f"{sys.argv[2]}/titans_pytorch"]
    sys.modules["titans_pytorch"] = package
    from titans_pytorch.neural_memory import NeuralMemory

    one, plain = {"chunk_size": 1, "batch_size": 1}, {"mem_model_norm_add_residual": False}
    four, linear = {"chunk_size": 4, "batch_size": 4}, {"default_model_kwargs": {"depth": 1}}
    mlp = {"default_model_kwargs": {"depth": 2, "expansion_factor": 2.0}}
    cases = {
        "linear_norm": {**one, **linear, "per_parameter_lr_modulation": True},
        "linear": {**one, **linear, **plain},
        "mlp_erf": {**one, **mlp, **plain},
        "mlp_tanh": {**one, **plain, "model": TanhMlp},
        "default_norm": {**one, "model": TanhMlp},
        "chunks": {**four, **linear, **plain, "momentum": False},
        "chunks_gates": {**four, **linear, **plain},
    }
    out = {}
    for seed, (name, options) in enumerate(cases.items()):
        torch.manual_seed(seed)
        options = {key: value(4, 2) if value is TanhMlp else value for key, value in options.items()}
        memory = NeuralMemory(dim=8, dim_head=4, heads=2, default_step_transform_max_lr=0.2, **options).eval()
        _randomise_titans(memory, name)
        x = torch.randn(2, 12, 8)
        with torch.no_grad():
            y, state = memory(x)
        weights, momentum = state.states
        own = [(key, p) for key, p in memory.named_parameters() if not key.startswith("memory_model.")]
        out |= arrays(f"{name}/", {"x": x, "y": y}.items()) | arrays(f"{name}/weights/", own)
        for i, key in enumerate(memory.memory_model_parameter_names):
            out[f"{name}/after/{i}"] = weights[key].view(2, 2, *weights[key].shape[1:]).numpy()
            if memory.to_momentum is not None:
                last = momentum[key][0]
                out[f"{name}/momentum/{i}"] = last.view(2, 2, *last.shape[1:]).numpy()
    return out


def _randomise_titans(memory, name):
    scale = 0.5 if "mlp" in name or "default" in name else 0.8  # of the start weights
    names = memory.memory_model_parameter_names
    with torch.no_grad():
        for key, p in memory.named_parameters():
            if key.startswith("memory_model."):
                continue  # a template; the learned start is in memory_model_parameters
            p.data = p.data.clone()  # the heads of a start share their numbers at first
            if "norm.weight" in key:
                p.copy_(1 + 0.2 * torch.randn_like(p))
            elif key.endswith("bias"):
                p.copy_(0.5 * torch.randn_like(p))
            else:
                p.copy_((scale if key.startswith("memory_model_parameters") else 0.4) * torch.randn_like(p))
        memory.to_decay_factor[0].bias.sub_(2.0)
        if "norm.gamma" in names:
            memory.memory_model_parameters[names.index("norm.gamma")].zero_()
        if name == "linear_norm":  # the scale of the norm is not trained, the weights with their full step
            modulation = memory.to_layer_modulation[0]
            modulation.weight.zero_()
            bias = modulation.bias.view(2, len(names))
            bias.fill_(40.0)
            bias[:, names.index("norm.gamma")] = -100.0
        if name == "chunks":  # no forgetting
            memory.to_decay_factor[0].weight.zero_()
            memory.to_decay_factor[0].bias.fill_(-100.0)


def ttt():
    """A TTT-Linear and a TTT-MLP layer over three mini-batches, and what its `ttt` method gives."""
    import ttt

    out = {}
    for seed, (name, layer, base) in enumerate((("linear", ttt.TTTLinear, 1.0), ("mlp", ttt.TTTMLP, 0.1))):
        torch.manual_seed(seed)
        config = ttt.TTTConfig(
            hidden_size=8, num_attention_heads=2, mini_batch_size=4, ttt_base_lr=base, use_gate=True, share_qk=False
        )
        module, found = layer(config, 0).eval(), {}
        with torch.no_grad():
            for key, p in module.named_parameters():
                if "norm" in key and "weight" in key:
                    p.copy_(1 + 0.2 * torch.randn_like(p))
                else:
                    p.copy_((0.1 if key == "learnable_token_idx" else 0.5) * torch.randn_like(p))
        inner = module.ttt
        module.ttt = lambda *args, inner=inner, found=found, **options: found.setdefault("got", inner(*args, **options))
        x = torch.randn(2, 12, 8)
        with torch.no_grad():
            y = module(x, position_ids=torch.arange(12)[None].repeat(2, 1))
        answer, after = found["got"]
        out |= arrays(f"{name}/", {"x": x, "y": y, "inner": answer}.items())
        out |= arrays(f"{name}/weights/", module.named_parameters())
        out |= arrays(f"{name}/after/", [(key, p) for key, p in after.items() if key.endswith("states")])
    return out


def hmt():
    """RecurrentWrapper over six segments with a cache of three memory embeddings, in float32 and on the CPU."""
    torch.Tensor.cuda = torch.Tensor.bfloat16 = lambda self, *args, **options: (
        self
    )  # both are called in the forward pass
    from transformers import LlamaConfig, LlamaForCausalLM  # before the empty modules, for which it would look

    unused = {
        "accelerate": {},
        "accelerate.logging": {"get_logger": lambda name: None},
        "evaluate": {"load": lambda name: None},
        "sklearn": {},
        "sklearn.metrics": dict.fromkeys(("accuracy_score", "precision_recall_fscore_support")),
    }
    for name, content in unused.items():  # of a log and of metrics, which are not computed here
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(content)
    from modeling_rmt.language_modeling import MemoryCell, RecurrentWrapper

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=True, use_cache=False,
        attn_implementation="eager",
    )  # fmt: skip
    decoder = LlamaForCausalLM(config)
    cell = MemoryCell(decoder, num_mem_tokens=1, num_prepend=2)
    embeddings = decoder.get_input_embeddings()
    model = RecurrentWrapper(cell, emb=embeddings, word_emb_dim=16, hidden_dim=4, ltm_context=3, n_cell_out=6)
    model = model.float().eval()
    randomise(model)
    with torch.no_grad():
        model.memory_cell.memory.copy_(torch.randn(1, 16))
        model.mem.copy_(torch.randn(1, 16))
        for p in model.cross_attn.parameters():
            p.copy_(0.4 * torch.randn_like(p))
    passes = []  # the summary and the main pass of each segment
    cell.register_forward_hook(lambda module, args, output: passes.append(output[1]))
    model.process_outputs = lambda cells, **options: torch.cat([one.logits for one in cells], dim=1)
    tokens = torch.randint(0, 40, (2, 36))
    with torch.no_grad():
        logits, _ = model(tokens, attention_mask=torch.ones_like(tokens), segment_size=6, sum_fraction=0.5)
    own = [(name, p) for name, p in model.named_parameters() if "mem_map" not in name]  # which only `switch` uses
    out = {"tokens": tokens.numpy().astype(np.int32), "logits": logits.numpy(), **arrays("weights/", own)}
    out["summaries"], out["embeddings"] = (torch.cat(passes[i::2], dim=1).numpy() for i in (0, 1))
    return out


def gpt2():
    """A tiny GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_inner=24, n_positions=32, bos_token_id=0, eos_token_id=0,
        use_cache=False, attn_implementation="eager",
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def rmt_gpt2():
    """RecurrentWrapper around a GPT-2 over five segments, with two memory tokens."""
    from modeling_rmt.language_modeling import MemoryCell, RecurrentWrapper

    torch.manual_seed(6)
    cell = MemoryCell(gpt2(), 2)
    model = RecurrentWrapper(cell, segment_size=6).eval()
    randomise(model)
    with torch.no_grad():
        cell.memory.copy_(torch.randn(2, 16))
    states = []
    cell.register_forward_hook(lambda module, args, output: states.append(output[1]))
    tokens = torch.randint(0, 40, (2, 30))
    with torch.no_grad():
        logits = model(tokens, attention_mask=torch.ones_like(tokens)).logits
    out = {"tokens": tokens.numpy().astype(np.int32), "logits": logits.numpy(), "memory": states[-1].numpy()}
    return out | arrays("weights/", model.named_parameters())


class Block(nn.Module):
    """A wrapped layer as newer versions of transformers call one: with positions, and a tensor as result."""

    def __init__(self, wrapped, names):
        super().__init__()
        self.wrapped, self.names, self.zero_mem = wrapped, names, wrapped.zero_mem

    def forward(self, *args, **options):
        return self.wrapped(**dict(zip(self.names, args, strict=False)), **options)[0]


class Tuple(nn.Module):
    """A layer that returns a tuple, as older versions of transformers have them."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.attn = inner, inner.attn

    def forward(self, hidden_states, **options):
        return (self.inner(hidden_states, **options),)


def armt_gpt2():
    """AssociativeRecurrentWrapper around a GPT-2 over five segments; two memory tokens have positions of their own."""
    import inspect

    sys.modules["wandb"] = types.ModuleType("wandb")  # imported, and not used
    from modeling_amt.language_modeling import AssociativeMemoryCell, AssociativeRecurrentWrapper

    torch.manual_seed(7)
    decoder = gpt2()
    names = list(inspect.signature(type(decoder.transformer.h[0]).forward).parameters)[1:]
    for i, layer in enumerate(decoder.transformer.h):
        decoder.transformer.h[i] = Tuple(layer)
    cell = AssociativeMemoryCell(decoder, 2, d_mem=4)
    layers = list(decoder.transformer.h)
    model = AssociativeRecurrentWrapper(cell, segment_size=6).eval()
    randomise(model)
    with torch.no_grad():
        cell.memory.copy_(torch.randn(2, 16))
        for layer in layers:
            for part in (layer.W_mq, layer.W_mk, layer.W_mv, layer.W_mb):
                for p in part.parameters():
                    p.copy_(0.3 * torch.randn_like(p))
    weights = {name.replace(".layer.inner.", ".layer."): p for name, p in model.named_parameters()}
    for i, layer in enumerate(layers):
        decoder.transformer.h[i] = Block(layer, names)
    after = []
    inner = cell.zero_mem
    cell.zero_mem = lambda: (after.append([(layer.W_mem, layer.z) for layer in layers]), inner())
    tokens = torch.randint(0, 40, (2, 30))
    with torch.no_grad():
        result = model(tokens, attention_mask=torch.ones_like(tokens))
    logits = (result[0] if isinstance(result, tuple) else result)["logits"]
    matrix, norm = (torch.stack([pair[i] for pair in after[-1]]).numpy() for i in (0, 1))
    out = {"tokens": tokens.numpy().astype(np.int32), "logits": logits.numpy(), "matrix": matrix, "norm": norm}
    return out | arrays("weights/", weights.items())


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[2])
    kind, file = {
        "lm2": (lm2, "lm2_official"),
        "titans": (titans, "titans_pytorch"),
        "ttt": (ttt, "ttt_official"),
        "hmt": (hmt, "hmt_official"),
        "rmt_gpt2": (rmt_gpt2, "rmt_gpt2_official"),
        "armt_gpt2": (armt_gpt2, "armt_gpt2_official"),
    }[sys.argv[1]]
    np.savez_compressed(GOLDEN / f"{file}.npz", **kind())
