"""The optimizer of a run: clipping, the configured algorithm, weight decay and learning rates by selector."""

import fnmatch
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lm2_jax.errors import UserError
from lm2_jax.parameters import LORA, MEMORY, ROLES, Parameter
from lm2_jax.precision import Precision, at_least_float32
from lm2_jax.registry import near_misses
from lm2_jax.training.optim_config import OptimConfig
from lm2_jax.types import PyTree

GROUPS = (MEMORY, LORA)
DECODER = "decoder"  # all parameters of the same decoder without memory and adapters
_DECODER_MODULES = {"embed", "head", "final_norm", "attention_norm", "attention", "mlp_norm", "mlp"}


def selects(selector: str, parameter: Parameter) -> bool:
    """Whether a role, a group, a module or a path pattern selects a parameter; see `optim_config`."""
    if selector in ROLES:
        return parameter.role == selector
    if selector in GROUPS:
        return parameter.group == selector
    if selector == DECODER:
        return parameter.group is None and not _DECODER_MODULES.isdisjoint(parameter.path.split("/"))
    return any(fnmatch.fnmatchcase(parameter.path, pattern) for pattern in (selector, f"{selector}/*"))


def decays(parameter: Parameter, config: OptimConfig) -> bool:
    """Whether weight decay applies to a parameter."""
    return any(selects(selector, parameter) for selector in config.decay_on)


def rate_of(parameter: Parameter, config: OptimConfig) -> float:
    """Learning rate of a parameter, relative to `optim.learning_rate`."""
    return next((factor for selector, factor in reversed(config.rate_rules) if selects(selector, parameter)), 1.0)


def trainable(parameters: PyTree, config: OptimConfig) -> PyTree:
    """For each parameter, whether it is trained.

    Args:
      parameters: tree with the `Parameter` of each array.
      config: `freeze`.
    Raises:
      UserError: a selector matches nothing, or everything is frozen.
    """
    selectors = {
        "decay_on": config.decay_on,
        "rates": [selector for selector, _ in config.rate_rules],
        "freeze": config.freeze,
    }
    for field, names in selectors.items():
        _check_selectors(f"optim.{field}", names, jax.tree.leaves(parameters))
    mask = jax.tree.map(lambda p: not any(selects(selector, p) for selector in config.freeze), parameters)
    if not any(jax.tree.leaves(mask)):
        raise UserError(f"optim.freeze={config.freeze} selects every parameter; at least one has to be trained.")
    return mask


def _check_selectors(field: str, selectors: Iterable[str], parameters: list[Parameter]) -> None:
    """Refuses a selector that is no role and no group and matches no path."""
    names = [*sorted(ROLES), *GROUPS, DECODER]
    for selector in selectors:
        if selector not in names and not any(selects(selector, p) for p in parameters):
            paths = sorted({p.path for p in parameters})
            modules = {path.rsplit("/", n)[0] for path in paths for n in range(path.count("/") + 1)}
            raise UserError(
                f"{field}: {selector!r} selects no parameter. Expected a role or group ({', '.join(names)}), a module, "
                f"or a pattern of a path such as {paths[-1]!r}.{near_misses(selector, [*names, *sorted(modules)])}"
            )


def select(mask: PyTree, tree: PyTree) -> PyTree:
    """`tree` with None in the place of every array whose `mask` is False."""
    return jax.tree.map(lambda kept, x: x if kept else None, mask, tree)


def merge(part: PyTree, tree: PyTree) -> PyTree:
    """`tree` with the arrays of `part` in place of its own, except where `part` has None."""
    return jax.tree.map(lambda old, new: old if new is None else new, tree, part)


def learning_rate(config: OptimConfig) -> optax.Schedule:
    """Linear warm-up to the peak at step `warmup_steps`, then the configured schedule.

    During warm-up the rate is peak * (step + 1) / (warmup_steps + 1), so the first step already learns.
    """
    first = config.learning_rate / (config.warmup_steps + 1)
    warmup = optax.linear_schedule(first, config.learning_rate, config.warmup_steps)
    schedule = optax.join_schedules([warmup, config.schedule.after_warmup(config)], [config.warmup_steps])

    def rate(step: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):  # optax mixes types
            return schedule(step)

    return rate


def make_optimizer(config: OptimConfig, precision: Precision, parameters: PyTree) -> optax.GradientTransformation:
    """The optimizer of a run.

    Args:
      config: what it does.
      precision: types of parameters and first moment; whether a master copy is kept.
      parameters: tree with the `Parameter` of each array, None for a frozen one (`select(trainable(..), ..)`).
    Returns:
      A transformation that computes in float32 or wider, whatever type the parameters have. Of its state, only the
      first moment may be narrower.
    """
    rates = jax.tree.map(lambda p: rate_of(p, config), parameters)
    optimizer = _in_float32(
        optax.chain(
            optax.clip_by_global_norm(config.clip_norm),
            config.algorithm.scale(config, parameters, jnp.dtype(precision.moments)),
            optax.add_decayed_weights(config.weight_decay, mask=jax.tree.map(lambda p: decays(p, config), parameters)),
            optax.stateless(lambda updates, _: jax.tree.map(lambda rate, u: rate * u, rates, updates)),
            optax.scale_by_learning_rate(learning_rate(config)),
        )
    )
    is_narrow = at_least_float32(precision.params) != jnp.dtype(precision.params)
    return _with_master_copy(optimizer) if is_narrow and precision.master_copy else optimizer


def tree_at_least_float32(tree: PyTree) -> PyTree:
    """Arrays in float32 or wider."""
    with jax.numpy_dtype_promotion("standard"):  # a wider type is what is asked for
        return jax.tree.map(lambda x: x.astype(at_least_float32(x.dtype)), tree)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` on parameters and gradients in float32 or wider; optax itself mixes types, so that is allowed here."""

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(tree_at_least_float32(updates), state, tree_at_least_float32(params))

    return optax.GradientTransformation(lambda params: inner.init(tree_at_least_float32(params)), update)


class MasterState(NamedTuple):
    """State of an optimizer that keeps a master copy."""

    inner: PyTree
    params: PyTree  # the parameters in float32


def _with_master_copy(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` on a float32 copy of the parameters; the parameters themselves are the copy, rounded.

    An update is the new copy minus the parameters. It is exact wherever the two differ by less than a factor of two,
    and what it loses elsewhere is not accumulated.
    """

    def init(params: PyTree) -> MasterState:
        return MasterState(inner.init(params), tree_at_least_float32(params))

    def update(updates: PyTree, state: MasterState, params: PyTree = None) -> tuple[PyTree, MasterState]:
        updates, inner_state = inner.update(updates, state.inner, state.params)
        master = jax.tree.map(jnp.add, state.params, updates)
        updates = jax.tree.map(jnp.subtract, master, tree_at_least_float32(params))
        return updates, MasterState(inner_state, master)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]
