"""A trained run, read back from its workdir."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from etils import epath

from lm2_jax.checkpoint import read_newest
from lm2_jax.config import RunConfig
from lm2_jax.data.tokenizers import FileTokenizer, load_tokenizer
from lm2_jax.folders import open_path
from lm2_jax.layout import Layout, sharded_shapes
from lm2_jax.model import LanguageModel
from lm2_jax.precision import prepare_numbers
from lm2_jax.training.state import make_plan, with_average
from lm2_jax.training.workdir import read_config, use_check

if TYPE_CHECKING:
    from lm2_jax.inference.snapshot import MemorySnapshot


class Run(NamedTuple):
    """Everything needed to use a trained model."""

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
    switches float64 on for the process.

    Args:
      workdir: folder or bucket that train.py wrote.
      layout: where the parameters are placed; None: on the first device.
    Raises:
      UserError: no such run; a damaged config, tokenizer or checkpoint; or a config or tokenizer that the checkpoint
        was not trained with.
    """
    workdir = open_path(workdir, "workdir")
    config = read_config(workdir)
    prepare_numbers(config.model.precision)
    model = LanguageModel(config.model)
    plan = make_plan(config, model)
    tokenizer = load_tokenizer(workdir, config.data.tokenizer)
    names = ["params"] + ["averaged"] * (plan.shapes.averaged is not None)
    wanted = {name: getattr(plan.shapes, name) for name in names}
    if layout is None:
        shardings: Any = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    else:
        shardings = layout.shardings({name: getattr(plan.axes, name) for name in names}, wanted)
    items, step = read_newest(workdir, sharded_shapes(wanted, shardings), use_check(workdir, config, tokenizer))
    params = with_average(items["params"], items["averaged"]) if "averaged" in items else items["params"]
    return Run(config, model, params, tokenizer, step)
