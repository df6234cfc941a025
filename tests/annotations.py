"""How the annotations of lm2_jax are checked while tests run; tests/conftest.py puts it to work."""

import typing

import beartype
import beartype.roar
from jaxtyping import Array, PyTree

check = beartype.beartype(
    conf=beartype.BeartypeConf(
        is_pep484_tower=True,  # an int passes for a float, as it does for pyright
        # A hint that cannot be checked at run time leaves its function unchecked.
        warning_cls_on_decorator_exception=beartype.roar.BeartypeClawDecorWarning,
        hint_overrides=beartype.FrozenDict(
            {
                typing.Self: typing.Any,  # known to beartype in decorated classes only
                PyTree[Array]: typing.Any,  # `State` is a tree of arrays or, just as well, of their axes or shapes
            }
        ),
    )
)
