"""Batches for a run: a Grain pipeline over (step, row), so that every batch is a function of its step."""

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence

import numpy as np

from lm2_jax.config import DataConfig
from lm2_jax.data.base import Example, Source
from lm2_jax.data.draws import draw
from lm2_jax.errors import UserError

_LAST_STEP = 2**40  # Grain needs an end


def segments_at(config: DataConfig, step: int) -> int:
    """Segments K of every row of step `step`: the curriculum stage's, or drawn from 1 to that."""
    most = config.segments[bisect_right(config.stage_steps, step)]
    return 1 + draw(config.seed, "segments", step) % most if config.vary_segments else most


def check(config: DataConfig) -> None:
    """Refuses rows that continue from step to step while the number of segments changes."""
    if config.source.continues and (config.vary_segments or len(set(config.segments)) > 1):
        raise UserError(
            "data.source continues from step to step (packing='ordered'), which needs the same number of segments at "
            f"every step, but data.segments={config.segments} and data.vary_segments={config.vary_segments}: give one "
            "number, or choose packing='packed'"
        )


def stack(examples: Sequence[Example]) -> Example:
    """Examples of equal size as a batch, rows first."""
    return Example(*map(np.stack, zip(*examples, strict=True)))


def concatenate(examples: Sequence[Example]) -> Example:
    """Examples one after another in one row."""
    return Example(*map(np.concatenate, zip(*examples, strict=True)))


def read_row(config: DataConfig, source: Source, step: int, row: int, held_out: bool) -> Example:
    """Row `row` of the global batch of a step: one document, or as many as fill it."""
    segments = segments_at(config, step)
    if not config.fill_rows:
        return source.example(step, row, config.rows, segments, held_out)
    # Every stage numbers its documents as if they were of one segment, so that none is read twice.
    most = max(config.segments)
    documents = range(row * most, row * most + most // segments)
    return concatenate([source.example(step, i, config.rows * most, segments, held_out) for i in documents])


def batches(
    config: DataConfig,
    source: Source,
    *,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    held_out: bool = False,
) -> Iterator[Example]:
    """This process's rows of the batch of every step from `start_step` on, prepared ahead by threads.

    A batch is a function of its step: a run that resumes, on any number of hosts, reads exactly what it would have
    read without the interruption.

    Args:
      config: rows, segments, seed and how many batches are prepared ahead.
      source: what `config.source` built.
      start_step: first step.
      process_index: which part of the rows; process p of n reads rows [p * rows / n, (p + 1) * rows / n). Processes
        that share their rows count as one.
      process_count: parts in all; divides `config.rows`.
      held_out: examples that training never sees.
    Returns:
      An endless iterator of batches with rows / process_count rows.
    """
    import grain  # slow to import

    check(config)
    if config.rows % process_count:
        raise UserError(f"data.rows={config.rows} is not a multiple of the {process_count} processes that share them")
    rows = config.rows // process_count

    def read(index: int) -> Example:
        step, row = divmod(index, rows)
        example = read_row(config, source, step, process_index * rows + row, held_out)
        alone = step < config.alone_steps and not held_out
        return example._replace(reset=np.ones_like(example.reset)) if alone else example

    dataset = grain.MapDataset.range(start_step * rows, _LAST_STEP * rows).map(read).batch(rows, batch_fn=stack)
    # Examples are made under Python's lock for the most part, so a thread for each core is enough.
    threads = min(config.prefetch, os.cpu_count() or 1)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=config.prefetch)
    return iter(dataset.to_iter_dataset(options))
