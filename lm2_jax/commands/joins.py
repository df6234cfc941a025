"""The join that goes with a memory chosen on the command line."""

import sys
from typing import Any

from lm2_jax.blocks.base import JoinConfig
from lm2_jax.commands import flags
from lm2_jax.config import ModelConfig, from_dict
from lm2_jax.errors import UserError


def choose_join(model: dict[str, Any]) -> None:
    """Changes the join in a model's table where it does not take the memory and only one other does.

    Raises:
      UserError: several other joins take it, or none.
    """
    kind, memory = model["join"]["kind"], model["memory"]["kind"]
    if _fits(model, model["join"]):
        return
    tables = {name: flags.change_kind(JoinConfig, model["join"], name, "--model.join") for name in JoinConfig.registry}
    fitting = [name for name, table in tables.items() if name != kind and _fits(model, table)]
    if len(fitting) == 1:
        model["join"] = tables[fitting[0]]
        print(f"--model.join {fitting[0]}: the join of memory {memory!r}", file=sys.stderr)
    elif fitting:
        raise UserError(
            f"--model.memory {memory} does not go with join {kind!r}; add --model.join with one of {', '.join(fitting)}"
        )


def _fits(model: dict[str, Any], join: dict[str, Any]) -> bool:
    try:
        from_dict(ModelConfig, model | {"join": join}, "", flags.FLAGS)
    except UserError:
        return False
    return True
