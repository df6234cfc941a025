"""The arms of benchmarks/grafted.py: which memory, which start, and the config of each run."""

import dataclasses
import pathlib
from typing import Literal, NamedTuple

from lm2_jax.blocks.base import JoinConfig
from lm2_jax.blocks.context import ContextJoin
from lm2_jax.blocks.gate import GateJoin
from lm2_jax.blocks.plain import PlainJoin
from lm2_jax.blocks.residual import ResidualJoin
from lm2_jax.config import CheckpointConfig, DataConfig, LossConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from lm2_jax.data.babilong_source import BabilongSource
from lm2_jax.decoder import LoraConfig
from lm2_jax.memory.base import MemoryConfig
from lm2_jax.memory.gated_bank import GatedBankConfig
from lm2_jax.memory.gated_delta import GatedDeltaConfig
from lm2_jax.memory.none import NoMemory
from lm2_jax.memory.titans import StepConfig, TitansConfig
from lm2_jax.presets.tiny import replace_model

Start = Literal["scratch", "trained", "lora"]
# Added to stories260K, with rows of 2,048 tokens and a scale of 0.03 on the memory's output, the gradient has a norm of
# 1.5e5 at the default initial step size (bias -3), and of 6.0 at this one, as that of the decoder alone.
TITANS = TitansConfig(num_heads=4, chunk_tokens=16, step=StepConfig(bias=-4.0))
MEMORIES: dict[str, tuple[MemoryConfig, JoinConfig]] = {
    "none": (NoMemory(), PlainJoin()),
    "lm2": (GatedBankConfig(num_slots=16), ResidualJoin()),
    "mag": (TITANS, GateJoin()),
    "mac": (TITANS, ContextJoin()),
    "delta": (GatedDeltaConfig(num_heads=4, chunk_tokens=64), GateJoin()),
}
STARTS: dict[str, str] = {
    "scratch": "from scratch",
    "trained": "pretrained, all trained",
    "lora": "pretrained, memory and adapters trained",
}
# Shares of all steps at which questions are about one more person, and at which rows take their last length.
_ASKED, _LONGER = (0.15, 0.35, 0.5), 0.6
_FEWEST = 20  # steps of a run with stages
SEARCH_SEED = 10_000  # none of the seeds that are reported


@dataclasses.dataclass(frozen=True)
class Training:
    """What all arms of a comparison have in common."""

    steps: int
    """Optimizer steps of a run."""
    rows: int
    """Rows of a step."""
    segments: tuple[int, int]
    """Segments of a document, first and in the last two fifths of the steps; a row always has the latter number."""
    segment_tokens: int
    """Tokens of a segment, within which the decoder attends."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of parameters and computation."""
    lora_rank: int = 8
    """Rank of the adapters."""
    layers: tuple[int, ...] | None = None
    """Blocks with a memory; None: all."""
    remat: Literal["none", "dots", "full"] = "full"
    """What the backward pass recomputes."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""


class Folders(NamedTuple):
    """Data of training."""

    babi: pathlib.Path
    books: pathlib.Path


class Arm(NamedTuple):
    """A memory and a start."""

    memory: str
    start: str

    def __str__(self) -> str:
        return f"{self.memory}-{self.start}"


def base(training: Training, folders: Folders) -> RunConfig:
    """Data, loss and optimizer of every run; its model has what a checkpoint does not say."""
    has_stages = training.steps >= _FEWEST
    return RunConfig(
        name="grafted",
        model=ModelConfig(memory=NoMemory(), join=PlainJoin(), remat=training.remat),
        data=DataConfig(
            source=BabilongSource(
                babi_dir=str(folders.babi),
                books_dir=str(folders.books),
                noise_fraction=0.2,
                noise_up_to=0.95,
                question_rate=1.0,
                asked=(1, 2, 3, 4) if has_stages else (),
                asked_steps=_at(_ASKED, training.steps) if has_stages else (),
                split_answers=True,
            ),
            rows=training.rows,
            segments=training.segments if has_stages else training.segments[-1:],
            stage_steps=_at((_LONGER,), training.steps) if has_stages else (),
            fill_rows=True,
        ),
        loss=LossConfig(answer_weight=1.0, text_weight=0.01),
        optim=OptimConfig(
            steps=training.steps,
            final_fraction=0.2,
            warmup_steps=min(50, training.steps // 10),
            beta2=0.999,
            weight_decay=0.0,
        ),
        train=TrainConfig(eval_batches=0),
        checkpoint=CheckpointConfig(every_steps=training.checkpoint_every, keep=1),
    )


def _at(shares: tuple[float, ...], steps: int) -> tuple[int, ...]:
    return tuple(round(share * steps) for share in shares)


def donor(memory: str) -> RunConfig | None:
    """A run with the memory and join that are added to the decoder; None without memory."""
    if memory == "none":
        return None
    config, join = MEMORIES[memory]
    return dataclasses.replace(replace_model(RunConfig(), memory=config, join=join), name=memory)


def run_of(
    arm: Arm, imported: RunConfig, training: Training, folders: Folders, seed: int, rate: float, steps: int
) -> RunConfig:
    """The config of one run.

    Args:
      arm: memory and start.
      imported: config of the decoder with this memory.
      training: what is common.
      folders: data of training.
      seed: of parameters and data.
      rate: peak learning rate.
      steps: of this run; the stages keep their shares.
    """
    like = base(dataclasses.replace(training, steps=steps), folders)
    model = dataclasses.replace(imported.model, remat=training.remat)
    frozen: tuple[str, ...] = ()
    if arm.start == "lora":
        lora = LoraConfig(rank=training.lora_rank, targets=("attention/*", "mlp/*"))
        model = dataclasses.replace(model, decoder=dataclasses.replace(model.decoder, lora=lora))
        frozen = ("decoder",)
    return dataclasses.replace(
        like,
        name=f"grafted_{arm.memory}_{arm.start}",
        model=model,
        data=dataclasses.replace(like.data, tokenizer=imported.data.tokenizer, seed=seed),
        optim=dataclasses.replace(like.optim, learning_rate=rate, freeze=frozen),
        train=dataclasses.replace(like.train, seed=seed),
    )
