"""A trained run, read back from its workdir."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from etils import epath

from lm2_jax.checkpoint import read_params
from lm2_jax.config import RunConfig
from lm2_jax.data.tokenizers import FileTokenizer, load_tokenizer
from lm2_jax.layout import Layout
from lm2_jax.model import LanguageModel
from lm2_jax.precision import prepare_numbers
from lm2_jax.training.state import make_plan
from lm2_jax.training.workdir import read_config

if TYPE_CHECKING:
    from lm2_jax.inference.snapshot import MemorySnapshot


class Run(NamedTuple):
    """All that is needed to use a trained model."""

    config: RunConfig
    model: LanguageModel
    params: Any
    tokenizer: FileTokenizer
    step: int

    def read(self, text: str | Iterable[str], memory: "MemorySnapshot | None" = None) -> "MemorySnapshot":
        """Reads any amount of text into a memory; see `lm2_jax.inference.read`."""
        from lm2_jax.inference import read

        return read(self, text, memory)

    def generate(
        self, prompts: str | Sequence[str], memory: "MemorySnapshot | None" = None, **options: Any
    ) -> list[str]:
        """The text after each prompt; see `lm2_jax.inference.generate` for the options."""
        from lm2_jax.inference import generate

        return generate(self, prompts, memory, **options)

    def score(self, texts: str | Sequence[str], memory: "MemorySnapshot | None" = None) -> list[float]:
        """log p(text | memory) of each text; see `lm2_jax.inference.score`."""
        from lm2_jax.inference import score

        return score(self, texts, memory)


def load_run(workdir: epath.PathLike, layout: Layout | None = None) -> Run:
    """Reads a run with the parameters of its newest intact checkpoint; the workdir is only read.

    If the run keeps a moving average of its parameters (`optim.ema_decay`), the average is read. A run in float64
    switches float64 on for the whole process.

    Args:
      workdir: folder or bucket that train.py wrote.
      layout: where the parameters lie; None: on the first device.
    Raises:
      UserError: no such run, a damaged config, tokenizer or checkpoint.
    """
    config = read_config(workdir)
    prepare_numbers(config.model.precision)
    model = LanguageModel(config.model)
    plan = make_plan(config, model)
    wanted, axes = (plan.shapes.params, plan.shapes.averaged), (plan.axes.params, plan.axes.averaged)
    if layout is None:
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: one, wanted)
    else:
        shardings = layout.shardings(axes, wanted)
    shapes, averaged = jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding), wanted, shardings
    )
    params, step = read_params(workdir, shapes, averaged)
    return Run(config, model, params, load_tokenizer(workdir, config.data.tokenizer), step)
