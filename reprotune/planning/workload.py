"""What SFT and DPO compute: tokens and largest micro-batches, from tokenized rows or published sizes."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from reprotune import params
from reprotune.data.chat_tokens import IGNORED
from reprotune.data.shards import read_shards
from reprotune.model.attention import Segment
from reprotune.planning.published import PAIRS, SFT_ROWS, mixture
from reprotune.planning.tracing import Shape
from reprotune.training import ordering, pairs

TRACED_EXAMPLES = 8
"""Examples of a micro-batch that are traced at most: more take longer. Kernels of others are not counted."""


@dataclass(frozen=True)
class Work:
    """What a training stage computes, over all devices and with padding."""

    largest: Shape
    """Its largest micro-batch."""
    measuring: Shape
    """The largest micro-batch of rows that are measured, without a backward pass."""
    tokens: float
    """Of rows that are trained on."""
    length: float
    """Tokens that a token's attention sees, averaged over tokens."""
    micro_batches: float
    """On one device."""
    steps: int
    measured: float
    """Tokens of rows that are measured, as often as they are."""
    held: float
    """Tokens of all rows, once each."""
    source: str
    """Where the numbers come from, in words."""


@dataclass(frozen=True)
class SftRows:
    examples: np.ndarray
    """Tokens of each training example."""
    rows: np.ndarray
    """Tokens of each row; one of several examples if they are packed."""
    labelled: float
    """Share of the tokens that have a label."""
    held_out: float
    """Tokens of all held-out rows."""
    largest: float
    """Tokens of the largest micro-batch."""
    source: str


def sft_work(settings: params.Params, tokenized: Path | None, devices: int, by_segment: bool) -> Work:
    """
    Args:
        tokenized: folder of the tokenized rows; None takes published sizes.
        by_segment: whether each example is attended to by itself; otherwise a micro-batch is one sequence.
    """
    section = settings.sft
    data = published_sft(settings) if tokenized is None else tokenized_sft(settings, tokenized)
    steps = math.ceil(len(data.rows) * section.epochs / section.global_batch_size)
    if by_segment:
        seen = data.examples
        examples = min(TRACED_EXAMPLES, max(1, round(data.largest / seen.mean())))
    else:
        seen, examples = data.rows * section.micro_batch_size, 1
    length = int(data.largest / examples)
    shape = Shape(
        rows=1,
        length=length * examples,
        labelled=int(length * examples * data.labelled),
        segments=(Segment(length, 0),) * examples,
        examples=examples,
    )
    return Work(
        largest=shape,
        measuring=shape,
        tokens=data.rows.mean() * steps * section.global_batch_size,
        length=(seen**2).sum() / seen.sum(),
        micro_batches=steps * section.global_batch_size / section.micro_batch_size / devices,
        steps=steps,
        measured=data.held_out * (2 + section.measurements),
        held=data.examples.sum() + data.held_out,
        source=data.source,
    )


def tokenized_sft(settings: params.Params, folder: Path) -> SftRows:
    train, held_out = (read_shards(folder, part).data for part in ("train", "held_out"))
    examples = pc.list_flatten(train.column("seq_lengths")).to_numpy().astype(float)
    rows = pc.list_value_length(train.column("input_ids")).to_numpy().astype(float)
    return SftRows(
        examples=examples,
        rows=rows,
        labelled=pc.mean(pc.not_equal(pc.list_flatten(train.column("labels")), IGNORED)).as_py(),
        held_out=pc.sum(pc.list_value_length(held_out.column("input_ids"))).as_py(),
        largest=np.sort(rows)[-settings.sft.micro_batch_size :].sum(),
        source=f"{folder}: {len(examples):,} examples",
    )


def published_sft(settings: params.Params) -> SftRows:
    tokenize = settings.tokenize.sft
    count, (tokens, answer), source = mixture(settings.data.sft, SFT_ROWS, tokenize.held_out)
    cut = min(tokens, tokenize.max_length)
    rows = examples = np.full(max(1, round(count)), cut)
    if tokenize.packing:
        rows = np.full(math.ceil(examples.sum() / tokenize.max_length), float(tokenize.max_length))
    return SftRows(
        examples=examples,
        rows=rows,
        labelled=answer / tokens,
        held_out=tokenize.held_out * cut,
        largest=settings.sft.micro_batch_size * tokenize.max_length,
        source=source,
    )


@dataclass(frozen=True)
class PreferenceRows:
    """Tokens of each pair: of one row if the prompt is shared, otherwise of two."""

    train: np.ndarray
    held_out: np.ndarray
    drawn: np.ndarray
    """Of the pairs of all steps, with padding."""
    longest: float
    """Tokens of the longest row."""
    answers: float
    """Share of a pair's tokens that are chosen or rejected."""
    source: str


def dpo_work(settings: params.Params, tokenized: Path | None, devices: int, shared: bool) -> Work:
    """
    Args:
        tokenized: folder of the tokenized pairs; None takes published sizes.
        shared: whether the prompt of a pair is computed once: a pair is then one row, otherwise two.
    """
    section, rows = settings.dpo, rows_of_pair(shared)
    if tokenized is None:
        data = published_pairs(settings, shared)
    else:
        data = tokenized_pairs(settings, tokenized, shared)
    longest = int(data.longest)
    branch = int(data.longest * data.answers / 2)
    segments = (Segment(longest - branch, 0), Segment(branch, longest - 2 * branch))

    def shape(count: int) -> Shape:
        labelled = int(rows * count * data.longest * data.answers)
        if shared:
            return Shape(1, count * longest, labelled, segments * count, count)
        return Shape(rows * count, longest, labelled)

    measured = data.held_out.sum() * (2 + section.measurements) + 2 * data.train[: pairs.MEASURED].sum()
    return Work(
        largest=shape(section.micro_batch_size),
        measuring=shape(settings.reference.batch_size),
        tokens=float(data.drawn.sum()),
        length=float((data.train.astype(float) ** 2).sum() / data.train.sum()) / rows,
        micro_batches=len(data.drawn) / section.micro_batch_size / devices,
        steps=section.steps,
        measured=float(measured),
        held=float(data.train.sum() + data.held_out.sum()),
        source=data.source,
    )


def rows_of_pair(shared: bool) -> int:
    return 1 if shared else 2


def tokenized_pairs(settings: params.Params, folder: Path, shared: bool) -> PreferenceRows:
    section = settings.dpo
    train, held_out = (read_shards(folder, part) for part in ("train", "held_out"))
    drawn = ordering.batches(
        train, list(pairs.COLUMNS), section.steps, section.global_batch_size, settings.seed
    )
    lengths = pairs.lengths(train, shared)
    answers = sum(len(pc.list_flatten(train.data.column(name))) for name in pairs.COLUMNS[1:])
    return PreferenceRows(
        train=lengths,
        held_out=pairs.lengths(held_out, shared),
        drawn=pairs.computed(drawn, section.micro_batch_size, shared),
        longest=lengths.max() / rows_of_pair(shared),
        answers=answers / lengths.sum(),
        source=f"{folder}: {len(lengths):,} pairs",
    )


def published_pairs(settings: params.Params, shared: bool) -> PreferenceRows:
    section, tokenize = settings.dpo, settings.tokenize.dpo
    count, sizes, source = mixture(settings.data.preferences, PAIRS, tokenize.held_out)
    prompt, chosen, rejected = sizes
    # max_length limits the prompt with its longer answer; a shared prompt leaves a row of both answers
    longest = (1 + shared) * tokenize.max_length
    pair = min(pairs.length(prompt, chosen, rejected, shared), rows_of_pair(shared) * longest)

    def pairs_of_this_length(number: float) -> np.ndarray:
        return np.full(max(1, round(number)), pair)

    return PreferenceRows(
        train=pairs_of_this_length(count),
        held_out=pairs_of_this_length(tokenize.held_out),
        drawn=pairs_of_this_length(section.steps * section.global_batch_size),
        longest=longest,
        answers=min(1.0, (chosen + rejected) / pair),
        source=source,
    )
