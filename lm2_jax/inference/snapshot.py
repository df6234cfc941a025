"""What a model remembers of the text that it has read: the state at the last segment border, and the tokens since."""

import dataclasses
import functools
import hashlib
import json
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from etils import epath

from lm2_jax.config import to_dict
from lm2_jax.errors import UserError
from lm2_jax.model import ModelState
from lm2_jax.types import Array, Float

if TYPE_CHECKING:
    from lm2_jax.runs import Run


@dataclasses.dataclass(frozen=True)
class Source:
    """A text that was read."""

    name: str
    sha256: str | None  # of its bytes; None while a text that is no file has not been read to its end
    tokens: int  # read so far
    is_complete: bool
    modified: str | None = None  # time of the file's last change, UTC


@dataclasses.dataclass(frozen=True)
class MemorySnapshot:
    """One row's memory after any amount of text.

    Full segments are always read from border to border. The tokens since the last border are kept as tokens, and read
    again where a text continues. So the snapshot, and every answer that follows from it, depends on the text alone and
    not on how the text was split into calls or files.
    """

    run: "Run" = dataclasses.field(repr=False)
    state: ModelState = dataclasses.field(repr=False)  # of one row, at the last border
    logits_V: Float[Array, " V"] | np.ndarray = dataclasses.field(repr=False)  # after the last token before the border
    open_tokens: np.ndarray = dataclasses.field(repr=False)  # [position] int32: tokens since the border
    tokens_read: int = 0
    sources: tuple[Source, ...] = ()
    merged_from: tuple[int, ...] = ()  # after a merge, the number of sources that came from each memory

    @property
    def position(self) -> int:
        """Tokens since the last border."""
        return len(self.open_tokens)

    def save(self, path: epath.PathLike) -> None:
        """Writes a memory file, all of it or nothing; see `lm2_jax.memory_file`.

        Raises:
          UserError: the file cannot be written.
        """
        from lm2_jax import memory_file

        memory_file.save(self, path)

    def check_run(self, run: "Run") -> None:
        """Raises UserError unless the memory is one of this model and tokenizer."""
        if self.run is run or (self.run.params is run.params and self.run.config.model == run.config.model):
            return
        if model_fingerprint(self.run) != model_fingerprint(run):
            raise UserError(
                f"memory: it was made by another model (preset {self.run.config.name!r}, step {self.run.step}) than "
                f"the one that uses it (preset {run.config.name!r}, step {run.step}); read it again with this model"
            )
        if self.run.tokenizer.fingerprint != run.tokenizer.fingerprint:
            raise UserError("memory: it was made with another tokenizer; read the text again with this one")


def empty_memory(run: "Run") -> MemorySnapshot:
    """The memory before any text."""
    state = _start(run.model)
    dtype = np.dtype(run.config.model.precision.logits)
    return MemorySnapshot(run, state, np.zeros(run.config.model.vocab_size, dtype), np.zeros(0, np.int32))


@functools.partial(jax.jit, static_argnums=0)
def _start(model: Any) -> ModelState:
    return model.init_state(1)


def model_fingerprint(run: "Run") -> str:
    """A hash of the model's config and of all its parameters; on a mesh, every process must call it."""
    digest = hashlib.sha256(json.dumps(to_dict(run.config.model), sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(run.params):
        array = np.asarray(leaf)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        digest.update(f"{name} {array.dtype} {list(array.shape)}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:32]
