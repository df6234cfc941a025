"""One memory for texts that were read independently; an experiment, see docs/generate.md."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from lm2_jax import cli
from lm2_jax.config import ModelConfig
from lm2_jax.errors import UserError
from lm2_jax.inference.reading import Reader
from lm2_jax.inference.snapshot import MemorySnapshot, Source
from lm2_jax.memory.base import Capability
from lm2_jax.model import ModelState, layer_groups

if TYPE_CHECKING:
    from lm2_jax.runs import Run


def merge(run: "Run", memories: Sequence[MemorySnapshot]) -> MemorySnapshot:
    """Merges memories of different texts.

    The states at the last segment borders are merged as the kind of memory defines it (`Memory.merged`). Then the
    tokens since those borders are read, in the order of the memories. What belongs to the end of a text is that of the
    last memory: attention windows, inputs of convolutions, and the logits that predict the first token of a
    continuation, if no token follows the border.

    Args:
      run: the model that made all of them.
      memories: at least two, the order as above. A memory of nothing changes nothing.
    Returns:
      The merged memory; `merged_from` marks it.
    Raises:
      UserError: fewer than two memories, one of another model or tokenizer, one with an unfinished text, or a model
        whose memory has no such sum.
    """
    if len(memories) < 2:
        raise UserError(f"merge: expected at least two memories, got {len(memories)}")
    check_mergeable(run.config.model)
    for number, memory in enumerate(memories, 1):
        memory.check_run(run)
        unfinished = [source for source in memory.sources if not source.is_complete]
        if unfinished:
            raise UserError(
                f"merge: memory {number} holds only the first {unfinished[0].tokens:,} tokens of "
                f"{unfinished[0].name!r}; finish reading it with {cli.program('generate')} --workdir W --memory FILE "
                "--read TEXT --save-memory FILE"
            )
    used = [memory for memory in memories if memory.sources]
    if len(used) < 2:
        return dataclasses.replace(used[0] if used else memories[0], run=run)
    at_border = [memory for memory in used if memory.tokens_read > memory.position]
    base = at_border[-1] if at_border else used[-1]
    state = merge_states(run, [memory.state for memory in at_border]) if len(at_border) > 1 else base.state
    border = MemorySnapshot(
        run, state, base.logits_V, np.zeros(0, np.int32), sum(memory.tokens_read - memory.position for memory in used)
    )
    reader = Reader(border)
    reader.begin(Source("tokens since the borders", None, 0, False))
    reader.feed(np.concatenate([memory.open_tokens for memory in used]))
    return dataclasses.replace(
        reader.memory,
        sources=tuple(source for memory in used for source in memory.sources),
        merged_from=tuple(len(memory.sources) for memory in used),
    )


def merge_states(run: "Run", states: Sequence[ModelState]) -> ModelState:
    """Merges states at segment borders, each with the same number of rows; row i of the result is that of all rows i.

    Args:
      run: the model that made all of them, which `check_mergeable` accepts.
      states: every row has read at least a segment.
    """
    config, groups = run.config.model, []
    for index, group in enumerate(layer_groups(config)):
        block, spec = config.block_of(group.first)
        module = block(spec, parent=None)

        def of_layer(params: Any, layers: Any, module: Any = module) -> Any:
            return module.apply({"params": params}, layers, method="merged")

        layers = [state.groups[index] for state in states]
        groups.append(jax.vmap(of_layer)(run.params[f"blocks_{group.first}"], layers))
    stack = config.join.stack(config.block_spec, parent=None)
    if stack is None:
        return ModelState(tuple(groups), None)
    variables = {"params": run.params["carrier"]}
    return ModelState(tuple(groups), stack.apply(variables, [state.stack for state in states], method="merged"))


def check_mergeable(config: ModelConfig) -> None:
    """Refuses models whose memories have no sum, with the reason.

    Raises:
      UserError: see above.
    """
    specs = [config.block_of(layer)[1] for layer in range(config.decoder.num_layers)]
    kinds = {spec.memory.kind: spec.memory for spec in (config.block_spec, *specs) if spec.memory.capabilities}
    obstacles = {
        kind: memory.merge_obstacle for kind, memory in kinds.items() if Capability.MERGE not in memory.capabilities
    }
    if config.decoder.max_tokens is not None:
        obstacles["full attention"] = "it keeps the keys of every token at its position in one text"
    elif not kinds:
        obstacles["none"] = "the model has no memory"
    if obstacles:
        reasons = "; ".join(f"{kind!r}: {reason}" for kind, reason in obstacles.items())
        raise UserError(
            f"merge: two memories of this model cannot be merged ({reasons}). Read the second text into the first "
            f"memory instead: {cli.program('generate')} --workdir W --memory FIRST --read SECOND_TEXT "
            "--save-memory BOTH"
        )
