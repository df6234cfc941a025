"""The models once more, token by token in numpy float64, written from the papers' equations and slow on purpose.

Where a paper's words and our models part, this follows the models, as their docstrings say ("Differs from the paper"):
RMT's memory tokens under a causal mask, as in its released code; LM2's gates with biases, and its write brought from
tokens to slots.

One row of text at a time; parameters as `LanguageModel` names them. Nothing here is imported from the models but the
configs and the table of identity rows.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from lm2_jax.config import ModelConfig
from lm2_jax.memory.bank_writes import BlockWrite, ContentWrite, PaperWrite, SlotsWrite
from lm2_jax.memory.gated_bank import identity_rows


class Past(NamedTuple):
    """Keys and values of all tokens so far, keys rotated to their place in the whole text."""

    k: list[np.ndarray]  # [G K] each
    v: list[np.ndarray]


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def rms_norm(x: np.ndarray, scale: np.ndarray, epsilon: float = 1e-5) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * scale


def decoder_norm(x: np.ndarray, p: dict[str, Any], epsilon: float) -> np.ndarray:
    """RMSNorm, or LayerNorm where there is a bias."""
    if "b" not in p:
        return rms_norm(x, p["scale"], epsilon)
    mean, deviation = x.mean(axis=-1, keepdims=True), np.sqrt(x.var(axis=-1, keepdims=True) + epsilon)
    return (x - mean) / deviation * p["scale"] + p["b"]


def mlp(x: np.ndarray, p: dict[str, Any]) -> np.ndarray:
    """SwiGLU, or GPT-2's MLP, whose GELU is 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    if "gated" in p:
        return swiglu(x, p)
    x = with_bias(x @ p["up"]["w"], p["up"])
    x = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return with_bias(x @ p["down"]["w"], p["down"])


def swiglu(x: np.ndarray, p: dict[str, Any]) -> np.ndarray:
    gated = x @ p["gated"]["w"]
    return (gated * sigmoid(gated) * (x @ p["up"]["w"])) @ p["down"]["w"]


def llama_frequencies(head_width: int, config: ModelConfig) -> list[float]:
    """Radians per position of each pair, as in Llama 3's published code: by wavelength."""
    out = []
    for i in range(head_width // 2):
        f = config.decoder.rope_theta ** (-2 * i / head_width)
        scaling = config.decoder.rope_scaling
        if scaling is not None:
            wavelength = 2 * math.pi / f
            low = scaling.original_tokens / scaling.low_frequency_factor
            high = scaling.original_tokens / scaling.high_frequency_factor
            if wavelength > low:
                f = f / scaling.factor
            elif wavelength >= high:
                blend = (scaling.original_tokens / wavelength - scaling.low_frequency_factor) / (
                    scaling.high_frequency_factor - scaling.low_frequency_factor
                )
                f = (1 - blend) * f / scaling.factor + blend * f
        out.append(f)
    return out


def rotated(x_HK: np.ndarray, position: int, frequencies: list[float]) -> np.ndarray:
    """Each pair (i, i + K/2) as a complex number, turned; without frequencies x itself."""
    if not frequencies:
        return x_HK
    half = x_HK.shape[-1] // 2
    turned = (x_HK[:, :half] + 1j * x_HK[:, half:]) * np.exp(1j * position * np.array(frequencies))
    return np.concatenate([turned.real, turned.imag], axis=-1)


def weights_over(q_K: np.ndarray, keys: list[np.ndarray], top_k: int | None = None) -> np.ndarray:
    """softmax(q k / sqrt(K)) over the keys, or over the k best of them."""
    scores = np.array([q_K @ k_K / math.sqrt(len(q_K)) for k_K in keys])
    if top_k is not None:
        least = sorted(scores)[-top_k]
        scores = np.where(scores >= least, scores, -np.inf)
    odds = np.exp(scores - scores.max())
    return odds / odds.sum()


def attended(
    q_HK: np.ndarray, keys: list[np.ndarray], values: list[np.ndarray], top_k: int | None = None
) -> np.ndarray:
    """What one query finds, head by head; keys and values [G K], group g serving H/G heads."""
    share = q_HK.shape[0] // keys[0].shape[0]
    out = np.zeros_like(q_HK)
    for h, q_K in enumerate(q_HK):
        weights = weights_over(q_K, [k[h // share] for k in keys], top_k)
        out[h] = sum(w * v[h // share] for w, v in zip(weights, values, strict=True))
    return out


def heads(x: np.ndarray, w_DHK: np.ndarray) -> np.ndarray:
    """x W for every head."""
    return np.tensordot(x, w_DHK, axes=1)


def merged(y_HK: np.ndarray, w_HKD: np.ndarray) -> np.ndarray:
    return np.tensordot(y_HK, w_HKD, axes=2)


def with_bias(y: np.ndarray, p: dict[str, Any]) -> np.ndarray:
    """A projection's output and its bias, if it has one."""
    return y + p["b"] if "b" in p else y


class Reference:
    """A model over one row."""

    def __init__(self, config: ModelConfig, params: Any):
        self.config, self.params = config, _numpy(params)
        is_rotated = config.decoder.max_positions is None
        self.frequencies = llama_frequencies(config.decoder.head_dim, config) if is_rotated else []
        self.with_memory = config.join.memory_layers(config.decoder.num_layers)
        self.layers = self._layers()

    def _layers(self) -> list[dict[str, Any]]:
        """Parameters of each layer, out of the stacks."""
        stacks = {int(name.removeprefix("blocks_")): p for name, p in self.params.items() if name.startswith("blocks_")}
        layers: list[dict[str, Any]] = []
        for first in sorted(stacks):
            assert first == len(layers)
            depth = len(stacks[first]["mlp_norm"]["scale"])
            layers += [_pick(stacks[first], i) for i in range(depth)]
        return layers

    def placed(self, x_TD: np.ndarray, start: int) -> np.ndarray:
        """Rows with their learned positions, if there are any."""
        if self.config.decoder.max_positions is None:
            return x_TD
        return x_TD + self.params["positions"]["table"][start : start + len(x_TD)]

    def head(self, x_D: np.ndarray) -> np.ndarray:
        if self.config.decoder.tie_head:
            return self.params["embed"]["table"] @ x_D
        return x_D @ self.params["head"]["w"]

    def unrotated(self, p: dict[str, Any], x_D: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Query, key and value of a normalised row."""
        q_HK, k_GK, v_GK = (with_bias(heads(x_D, p[n]["w"]), p[n]) for n in ("q_proj", "k_proj", "v_proj"))
        if self.config.decoder.qk_norm:
            epsilon = self.config.decoder.norm_epsilon
            q_HK, k_GK = (rms_norm(y, p[n]["scale"], epsilon) for y, n in ((q_HK, "q_norm"), (k_GK, "k_norm")))
        return q_HK, k_GK, v_GK

    def self_attention(self, p: dict[str, Any], x_D: np.ndarray, position: int, past: Past, first: int) -> Any:
        """Output of one token, its unrotated query; its key and value join the past.

        Args:
          p: parameters of the attention.
          x_D: normalised input.
          position: in the whole text.
          past: of this layer.
          first: earliest position that is seen.
        """
        q_HK, k_GK, v_GK = self.unrotated(p, x_D)
        past.k.append(rotated(k_GK, position, self.frequencies))
        past.v.append(v_GK)
        y_HK = attended(rotated(q_HK, position, self.frequencies), past.k[first:], past.v[first:])
        return with_bias(merged(y_HK, p["o_proj"]["w"]), p["o_proj"]), q_HK

    def run(self, tokens: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits of a text of whole segments, and all memories behind it."""
        if self.config.join.kind == "tokens":
            return self.run_memory_tokens(tokens)
        T, layers = self.config.segment_tokens, range(self.config.decoder.num_layers)
        pasts = [Past([], []) for _ in layers]
        threaded = getattr(self.config.join, "topology", "per_layer") == "threaded"
        memories = [self.first_memory(self.layers[layer]) for layer in self.with_memory[: 1 if threaded else None]]
        logits = []
        for begin in range(0, len(tokens), T):
            start = begin if self.config.decoder.max_tokens is not None else 0
            x_TD = self.placed(self.params["embed"]["table"][tokens[begin : begin + T]], start)
            written = memories[0] if threaded and memories else None
            for layer in layers:
                bank = None
                if layer in self.with_memory:
                    nth = 0 if threaded else self.with_memory.index(layer)
                    bank = memories[nth]
                x_TD, wrote = self.block(self.layers[layer], x_TD, begin, pasts[layer], bank, written)
                if threaded:
                    written = written if wrote is None else wrote
                elif wrote is not None:
                    memories[nth] = wrote
            if threaded:
                memories = [written]
            final = decoder_norm(x_TD, self.params["final_norm"], self.config.decoder.norm_epsilon)
            logits += [self.head(x_D) for x_D in final]
        return np.array(logits), memories

    def first_memory(self, p: dict[str, Any]) -> np.ndarray:
        memory = self.config.memory
        if memory.start == "learned":
            return p["memory"]["start"]
        return identity_rows(memory.num_slots, self.config.decoder.width)

    def block(self, p: dict[str, Any], x_TD: np.ndarray, begin: int, past: Past, bank: Any, written: Any) -> Any:
        """One segment through one block.

        Args:
          p: parameters of the block.
          x_TD: its input.
          begin: position of its first token in the whole text.
          past: keys and values of this layer.
          bank: the memory as it stood before the segment, None in a block without.
          written: what blocks below made of a threaded memory, None where each block has its own.
        Returns:
          Output, and the new memory or None.
        """
        epsilon, window = self.config.decoder.norm_epsilon, self.config.decoder.window_tokens
        found, queries = [], []
        for t, x_D in enumerate(x_TD):
            first = begin if window is None else max(0, begin + t - window + 1)
            first = 0 if self.config.decoder.max_tokens is not None else first
            normed = decoder_norm(x_D, p["attention_norm"], epsilon)
            y_D, q_HK = self.self_attention(p["attention"], normed, begin + t, past, first)
            found.append(y_D)
            queries.append(q_HK)
        found_TD = np.array(found)
        h_TD = x_TD + found_TD
        if bank is not None:
            h_TD = h_TD + np.array([self.recall(p, y, q, bank) for y, q in zip(found_TD, queries, strict=True)])
        out_TD = h_TD + mlp(decoder_norm(h_TD, p["mlp_norm"], epsilon), p["mlp"])
        if bank is None:
            return out_TD, None
        source_TD = found_TD if self.config.join.source == "attention" else out_TD
        old = bank if written is None else written
        write = {
            SlotsWrite: self.write_slots,
            PaperWrite: self.write_paper,
            ContentWrite: self.write_paper,
            BlockWrite: self.write_block,
        }
        return out_TD, write[type(self.config.memory.write)](p, source_TD, old, begin, past)

    def projected(self, p: dict[str, Any], bank_ND: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Slots as keys and values of the read."""
        rows_ND = rms_norm(bank_ND, p["memory"]["norm"]["scale"]) if self.config.memory.norm_slots else bank_ND
        shared = self.config.join.read == "shared"
        k = p["attention"]["k_proj"] if shared else p["memory"]["k"]
        v = p["attention"]["v_proj"] if shared else p["memory"]["v"]
        return [heads(row, k["w"]) for row in rows_ND], [heads(row, v["w"]) for row in rows_ND]

    def recall(self, p: dict[str, Any], found_D: np.ndarray, q_HK: np.ndarray, bank_ND: np.ndarray) -> np.ndarray:
        """E_mem, then g_out = sigmoid(E_mem W_out) times it."""
        join, keys_values = self.config.join, self.projected(p, bank_ND)
        top_k = self.config.memory.top_k
        if join.read == "shared":
            y_D = merged(attended(q_HK, *keys_values, top_k), p["attention"]["o_proj"]["w"])
        else:
            asking_D = self.given(p, found_D[None])[0]
            y_D = attended(heads(asking_D, p["memory"]["q"]["w"]), *keys_values, top_k).reshape(-1)
        if join.gate:
            y_D = sigmoid(y_D @ p["gate_output"]["w"]["w"] + p["gate_output"]["b"]["b"]) * y_D
        return y_D * p["loudness"]["b"] if join.silent_start else y_D

    def given(self, p: dict[str, Any], x_TD: np.ndarray) -> np.ndarray:
        """Tokens as they ask the bank and are written: normalised in the form with content."""
        write = self.config.memory.write
        is_normed = isinstance(write, ContentWrite) and write.normalised
        return rms_norm(x_TD, p["memory"]["norm_tokens"]["scale"]) if is_normed else x_TD

    def gated(self, p: dict[str, Any], old: np.ndarray, new: np.ndarray, for_input: Any, for_forget: Any) -> np.ndarray:
        """M' = g_in tanh(U) + g_forget M."""
        g_in = sigmoid(for_input @ p["gate_input"]["w"]["w"] + p["gate_input"]["b"]["b"])
        g_forget = sigmoid(for_forget @ p["gate_forget"]["w"]["w"] + p["gate_forget"]["b"]["b"])
        return g_in * np.tanh(new) + g_forget * old

    def write_slots(self, p: dict[str, Any], x_TD: np.ndarray, bank_ND: np.ndarray, begin: int, past: Past) -> Any:
        """Each slot asks the segment and the other slots from behind the segment's end."""
        write, w = self.config.memory.write, p["memory"]["writer"]
        T, head_width = len(x_TD), self.config.decoder.width // self.config.memory.num_heads
        frequencies = [10_000.0 ** (-2 * i / head_width) for i in range(head_width // 2)]
        if not write.positions:
            frequencies = [0.0] * len(frequencies)
        tokens = rms_norm(x_TD, w["norm_tokens"]["scale"])
        slots = rms_norm(bank_ND, w["norm_slots"]["scale"])
        keys = [rotated(heads(x, w["k"]["w"]), t, frequencies) for t, x in enumerate(tokens)]
        values = [heads(x, w["v"]["w"]) for x in tokens]
        new = []
        for n, slot in enumerate(slots):
            asking = slot + w["code"]["code"][n] if write.codes else slot
            q_HK = heads(asking, w["q"]["w"])
            scores_of = list(keys)
            if write.attend_slots:
                scores_of += [rotated(heads(s, w["k"]["w"]), T, frequencies) for s in slots]
            seen = values + ([heads(s, w["v"]["w"]) for s in slots] if write.attend_slots else [])
            y_HK = attended(rotated(q_HK, T, frequencies), scores_of, seen)
            found = bank_ND[n] + merged(y_HK, w["o"]["w"])
            normed = rms_norm(found, w["norm_found"]["scale"])
            candidate = swiglu(normed, w["mlp"]) if write.candidate == "mlp" else found
            if write.gated:
                new.append(self.gated(w, bank_ND[n], candidate, normed, normed))
            else:
                new.append(rms_norm(found + candidate, w["norm_new"]["scale"]))
        return np.array(new)

    def write_paper(self, p: dict[str, Any], x_TD: np.ndarray, bank_ND: np.ndarray, begin: int, past: Past) -> Any:
        """R = A^T normalised over tokens, head by head; M' = sig(R E W_in) tanh(U) + sig(U W_f) M.

        U = R E_mem; in the form with content R (E_mem + E), and the queries of A are rotated to t - T.
        """
        memory, w = self.config.memory, p["memory"]["writer"]
        H, D, T, form = memory.num_heads, self.config.decoder.width, len(x_TD), memory.write
        x_TD, is_extended = self.given(p, x_TD), isinstance(form, ContentWrite)
        frequencies = [10_000.0 ** (-2 * i * H / D) for i in range(D // H // 2)]
        own = rms_norm(bank_ND, p["memory"]["norm"]["scale"]) if memory.norm_slots else bank_ND
        keys = [heads(row, p["memory"]["k"]["w"]) for row in own]
        values = [heads(row, p["memory"]["v"]["w"]) for row in own]
        candidate, tokens = np.zeros_like(bank_ND), np.zeros_like(bank_ND)
        for h in range(H):
            part = slice(h * D // H, (h + 1) * D // H)
            all_heads = [heads(x, p["memory"]["q"]["w"]) for x in x_TD]
            if is_extended and form.positions:
                all_heads = [rotated(q_HK, t - T, frequencies) for t, q_HK in enumerate(all_heads)]
            queries = [q_HK[h] for q_HK in all_heads]
            A_TN = np.array([weights_over(q, [k[h] for k in keys], memory.top_k) for q in queries])
            read_TK = A_TN @ np.array([v[h] for v in values])
            for n in range(len(bank_ND)):
                total = A_TN[:, n].sum()
                R_T = A_TN[:, n] / total if total > 0 else A_TN[:, n]
                candidate[n, part] = R_T @ (read_TK + x_TD[:, part] if is_extended and form.content else read_TK)
                tokens[n, part] = R_T @ x_TD[:, part]
        return self.gated(w, bank_ND, candidate, tokens, candidate)

    def write_block(self, p: dict[str, Any], x_TD: np.ndarray, bank_ND: np.ndarray, begin: int, past: Past) -> Any:
        """Slots as tokens right behind the segment, through attention and MLP of the block."""
        T, a, w = len(x_TD), p["attention"], p["memory"]["writer"]
        epsilon = self.config.decoder.norm_epsilon
        rows = rms_norm(bank_ND, p["memory"]["norm"]["scale"]) if self.config.memory.norm_slots else bank_ND
        rows = rows + w["code"]["code"] if self.config.memory.write.codes else rows
        normed = [decoder_norm(row, p["attention_norm"], epsilon) for row in rows]
        place = begin + T
        keys = past.k[begin:] + [rotated(heads(x, a["k_proj"]["w"]), place, self.frequencies) for x in normed]
        values = past.v[begin:] + [heads(x, a["v_proj"]["w"]) for x in normed]
        new = []
        for n, x in enumerate(normed):
            q_HK = rotated(heads(x, a["q_proj"]["w"]), place, self.frequencies)
            h_D = rows[n] + merged(attended(q_HK, keys, values), a["o_proj"]["w"])
            h_D = h_D + mlp(decoder_norm(h_D, p["mlp_norm"], epsilon), p["mlp"])
            candidate = rms_norm(h_D, w["norm"]["scale"])
            gated = self.config.memory.write.gated
            new.append(self.gated(w, bank_ND[n], candidate, candidate, candidate) if gated else candidate)
        return np.array(new)

    def run_memory_tokens(self, tokens: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """RMT: [memory; segment; memory], the last m outputs are the next memory.

        Under one causal mask, as in the released code; with `mutual` as in the paper: memory tokens on one side of
        the segment all see each other.
        """
        T, m, logits = self.config.segment_tokens, self.config.memory.num_tokens, []
        memory = self.params["carrier"]["memory"]["start"]
        for begin in range(0, len(tokens), T):
            x = np.concatenate([memory, self.params["embed"]["table"][tokens[begin : begin + T]], memory])
            x = self.placed(x, 0)
            for p in self.layers:
                if self.config.join.mask == "mutual":
                    x = self.mutual_block(p, x, m)
                else:
                    x, _ = self.block(p, x, 0, Past([], []), None, None)
            x = decoder_norm(x, self.params["final_norm"], self.config.decoder.norm_epsilon)
            logits += [self.head(y) for y in x[m : m + T]]
            memory = x[m + T :]
        return np.array(logits), [memory]

    def mutual_block(self, p: dict[str, Any], rows: np.ndarray, m: int) -> np.ndarray:
        """A block in which the first m rows see each other, the last m everything."""
        a, epsilon, out = p["attention"], self.config.decoder.norm_epsilon, []
        normed = [decoder_norm(x, p["attention_norm"], epsilon) for x in rows]
        keys = [rotated(heads(x, a["k_proj"]["w"]), i, self.frequencies) for i, x in enumerate(normed)]
        values = [heads(x, a["v_proj"]["w"]) for x in normed]
        for i, x in enumerate(normed):
            seen = len(rows) if i >= len(rows) - m else max(i + 1, m)
            q_HK = rotated(heads(x, a["q_proj"]["w"]), i, self.frequencies)
            h_D = rows[i] + merged(attended(q_HK, keys[:seen], values[:seen]), a["o_proj"]["w"])
            out.append(h_D + mlp(decoder_norm(h_D, p["mlp_norm"], epsilon), p["mlp"]))
        return np.array(out)


def _numpy(tree: Any) -> Any:
    return {k: _numpy(v) for k, v in tree.items()} if isinstance(tree, dict) else np.asarray(tree, np.float64)


def _pick(tree: Any, layer: int) -> Any:
    return {k: _pick(v, layer) for k, v in tree.items()} if isinstance(tree, dict) else tree[layer]
