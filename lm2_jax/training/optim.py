"""AdamW, and the table that says which parameters decay and how fast each learns."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm2_jax.config import OptimConfig, RunConfig
from lm2_jax.precision import safe
from lm2_jax.types import Axes, PyTree

# A parameter's path is cut into words at "/" and "_"; the first row with one of them says what the parameter is.
# ("gated" is no such word: the SwiGLU's gated kernel is a matrix.)
KINDS: tuple[tuple[str, frozenset[str]], ...] = (
    ("gate", frozenset({"gate", "gates", "loudness"})),
    ("start", frozenset({"start", "code"})),  # one vector per slot
    ("norm", frozenset({"norm", "scale"})),
    ("bias", frozenset({"b", "bias"})),
    ("conv", frozenset({"conv"})),  # a few taps per channel: no matrix, whatever its rank
)
MEMORY = frozenset({"memory", "carrier"})  # words that say "this belongs to a memory"


def _path_words(path: Any) -> list[str]:
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    return [word for name in names for word in name.split("_")]


def kind_of(path: Any, axes: Axes) -> str:
    """What one parameter is: gate, start, norm, bias, conv, else matrix or vector by its rank.

    Args:
      path: key path of the parameter in its tree.
      axes: logical axis names; "layers" counts equal blocks that are stacked and is no dimension of the parameter.
    """
    words = _path_words(path)
    for kind, marks in KINDS:
        if marks.intersection(words):
            return kind
    return "matrix" if sum(name != "layers" for name in axes) >= 2 else "vector"


def decays(path: Any, axes: Axes) -> bool:
    """Whether weight decay applies: to matrices only."""
    return kind_of(path, axes) == "matrix"


def rate_of(path: Any, axes: Axes, config: OptimConfig) -> float:
    """Relative learning rate: gates have their own, so have all other parameters of a memory."""
    if kind_of(path, axes) == "gate":
        return config.gate_multiplier
    return config.memory_multiplier if MEMORY.intersection(_path_words(path)) else 1.0


def map_parameters(fn: Any, axes: PyTree) -> PyTree:
    """`fn(path, axes)` for each parameter; `axes` has a tuple of names in the place of each."""
    return jax.tree_util.tree_map_with_path(fn, axes, is_leaf=lambda leaf: type(leaf) is tuple)


def learning_rate(config: OptimConfig) -> optax.Schedule:
    """Linear warm-up to the peak at step `warmup_steps`, then half a cosine down to `final_fraction` of it.

    The first step already learns: during warm-up the rate is peak * (step + 1) / (warmup_steps + 1).
    """
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (config.warmup_steps + 1),
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=config.steps,
        end_value=config.learning_rate * config.final_fraction,
    )

    def rate(step: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):  # optax mixes types
            return schedule(step)

    return rate


def make_optimizer(config: RunConfig, axes: PyTree) -> optax.GradientTransformation:
    """Clipping, AdamW and the rates of gates and memory.

    Args:
      config: `optim`, and the type of the first moment.
      axes: logical axes of the parameters.
    Returns:
      A transformation whose state is float32 at least but for the first moment, whatever type the parameters have.
    """
    optim = config.optim
    rates = map_parameters(lambda path, names: rate_of(path, names, optim), axes)
    return _wide(
        optax.chain(
            optax.clip_by_global_norm(optim.clip_norm),
            optax.scale_by_adam(
                optim.beta1, optim.beta2, optim.epsilon, mu_dtype=jnp.dtype(config.model.precision.moments)
            ),
            optax.add_decayed_weights(optim.weight_decay, mask=map_parameters(decays, axes)),
            optax.stateless(lambda updates, _: jax.tree.map(lambda rate, u: rate * u, rates, updates)),
            optax.scale_by_learning_rate(learning_rate(optim)),
        )
    )


def widen(tree: PyTree) -> PyTree:
    """Arrays of float32 at least."""
    with jax.numpy_dtype_promotion("standard"):  # a wider type is what is asked for
        return jax.tree.map(lambda x: x.astype(safe(x.dtype)), tree)


def _wide(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` on parameters and gradients of float32 at least; optax itself mixes types, so that is allowed here."""

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(widen(updates), state, widen(params))

    return optax.GradientTransformation(lambda params: inner.init(widen(params)), update)
