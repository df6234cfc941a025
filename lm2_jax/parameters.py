"""What a parameter is, declared where it is made: its logical axes, its role, and the group that it belongs to.

    self.param("w", named(init, ("embed", "mlp")), shape, dtype)                 # a weight
    self.param("w", named(init, ("embed", "heads"), role=Role.GATE), shape, dtype)

The declaration is kept in the box that Linen puts around a parameter in `init`; `describe` reads it back. All
parameters below a module that has an attribute `parameter_group` belong to that group, so the parameters of a memory
are those of the module `Memory`.
"""

import dataclasses
import enum
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from flax.core import meta

from lm2_jax.types import Axes, PyTree

MEMORY = "memory"  # the group of all parameters that only a memory uses
LORA = "lora"  # the group of all low-rank adapters
LAYERS = "layers"  # axis over equal blocks whose parameters are stacked; no dimension of one parameter


class Role(enum.StrEnum):
    """What a parameter does, as far as an optimizer treats it differently."""

    WEIGHT = "weight"  # a matrix, or a kernel of more dimensions
    EMBEDDING = "embedding"  # token embedding
    HEAD = "head"  # output projection to the vocabulary
    NORM = "norm"  # scale or shift of a normalisation
    BIAS = "bias"  # added vector
    GATE = "gate"  # weight or bias of a gate
    START = "start"  # learned initial state, prefix or code: one vector per row
    CONV = "conv"  # a few taps per channel


ROLES = frozenset(role.value for role in Role)


class DeclaredParameter(nn.LogicallyPartitioned):
    """A parameter in `init`, with its declaration.

    Attributes:
      value: the array.
      names: logical axes.
      role: what it does.
      in_dims: leading dimensions of a weight that are summed over, "layers" not counted.
      group: whose it is, as declared at the parameter; else the module's (`init_parameters`).
    """

    role: Role = struct.field(default=Role.WEIGHT, pytree_node=False)
    in_dims: int = struct.field(default=1, pytree_node=False)
    group: str | None = struct.field(default=None, pytree_node=False)

    __eq__ = nn.LogicallyPartitioned.__eq__
    __hash__ = None  # pyright: ignore[reportAssignmentType]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """Declaration of one parameter.

    Attributes:
      path: names of the modules and of the parameter, joined by "/".
      axes: logical axes, "layers" included.
      role: what it does.
      in_dims: leading dimensions of a weight that are summed over, "layers" not counted.
      group: "memory", "lora" or None.
    """

    path: str
    axes: Axes
    role: Role
    in_dims: int = 1
    group: str | None = None

    @property
    def dims(self) -> tuple[int, ...]:
        """Dimensions of the parameter itself, without the one over stacked blocks."""
        return tuple(i for i, name in enumerate(self.axes) if name != LAYERS)


def named(
    init: Callable[..., Any],
    axes: tuple[str, ...],
    role: Role | None = None,
    in_dims: int = 1,
    group: str | None = None,
) -> Any:
    """An initializer whose parameter carries its declaration; in a module, the parameter is a plain array.

    Args:
      init: initializer `(key, shape, dtype) -> array`.
      axes: logical name of each dimension.
      role: what the parameter does; None: a weight, or a bias where it has one dimension.
      in_dims: leading dimensions that are summed over.
      group: whose it is; None: that of the module in which it is made.
    """
    role = role or (Role.WEIGHT if len(axes) > 1 else Role.BIAS)

    def declared(*arguments: Any, **keywords: Any) -> DeclaredParameter:
        # The copy is an equation of the traced program: where Linen evaluates that program to find what a scan does
        # not change, an initial value that is a constant would come out as a numpy array, which is no `jax.Array`.
        value = jnp.copy(init(*arguments, **keywords))
        return DeclaredParameter(value, axes, role=role, in_dims=in_dims, group=group)

    return declared


def init_parameters(init: Callable[[], PyTree]) -> PyTree:
    """Runs a Linen `init` and marks each parameter with the group of the module that made it.

    Args:
      init: returns the parameters, in their boxes.
    Raises:
      ValueError: a parameter was made without `named`.
    """
    groups: dict[tuple[str, ...], str] = {}

    def note_group(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        group = getattr(context.module, "parameter_group", None)
        if group is not None and context.module.scope is not None:
            groups[context.module.path] = group
        return call(*args, **kwargs)

    with nn.intercept_methods(note_group):
        params = init()

    def mark(path: Any, box: Any) -> Any:
        names = tuple(key.key for key in path)
        if not isinstance(box, DeclaredParameter):
            raise ValueError(f"parameter {'/'.join(names)} is not declared; make it with `lm2_jax.layers.named`")
        found = [groups[names[:n]] for n in range(len(names), 0, -1) if names[:n] in groups]
        return box.replace(group=box.group or (found[0] if found else None))

    return jax.tree_util.tree_map_with_path(mark, params, is_leaf=_is_box)


def describe(boxed: PyTree) -> PyTree:
    """The declaration of each parameter.

    Args:
      boxed: result of `init_parameters`, or of a model's `init`.
    Returns:
      The tree with a `Parameter` in the place of each box.
    """

    def one(path: Any, box: DeclaredParameter) -> Parameter:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return Parameter(name, tuple(box.names), box.role, box.in_dims, box.group)

    return jax.tree_util.tree_map_with_path(one, boxed, is_leaf=_is_box)


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, meta.AxisMetadata)
