"""Whether the run that params.yaml describes fits given devices, and what time and disk it takes."""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from reprotune import params, params_file
from reprotune.data.spool import TOKEN
from reprotune.dvc_lock import read_stages
from reprotune.errors import InputError
from reprotune.planning import devices
from reprotune.planning.costs import Need
from reprotune.planning.devices import GIB, Machine
from reprotune.planning.needs import ADAM, WEIGHT, needs
from reprotune.planning.published import BENCHMARKS
from reprotune.planning.workload import Work
from reprotune.training import checkpoints, trainers

Tokenized = dict[str, Path | None]
"""Folders of the rows of sft and dpo; None where there are none with these params."""

CHANGES: dict[str, tuple[tuple[str, Any], ...]] = {
    "sft": (
        ("sft.gradient_checkpointing", True),
        ("sft.micro_batch_size", 1),
        ("model.quantization", "nf4"),
    ),
    "reference": (("reference.batch_size", 1), ("model.quantization", "nf4")),
    "dpo": (
        ("dpo.gradient_checkpointing", True),
        ("reference.batch_size", 1),
        ("dpo.micro_batch_size", 1),
        ("model.quantization", "nf4"),
    ),
    "evaluate": (
        ("evaluate.batch_texts", 1),
        ("evaluate.batch_tokens", 1),
        ("model.quantization", "nf4"),
    ),
}
"""What lowers a stage's memory, in the order in which it is tried."""


def run(arguments: argparse.Namespace) -> None:
    """Print what a run needs; exit with code 1 if a stage does not fit."""
    if not show(*prepared(arguments)):
        sys.exit(1)


def prepared(
    arguments: argparse.Namespace,
) -> tuple[params.Params, PreTrainedConfig, Machine, Tokenized]:
    """The arguments of `needs`.

    Raises:
        InputError: an option or params.yaml is wrong, or the base model's config is not here.
    """
    if arguments.gpus is not None and arguments.gpus < 1:
        raise InputError(f"--gpus: found {arguments.gpus}, expected at least 1")
    if arguments.utilization is not None and not 0 < arguments.utilization <= 1:
        raise InputError(
            f"--utilization: found {arguments.utilization}, expected a share, more than 0 and at most 1"
        )
    settings = params_file.load(arguments.params)
    locked = read_stages(arguments.lock)
    machine = devices.machine(arguments.gpu, arguments.gpus, arguments.utilization, settings.model.dtype)
    for stage in (settings.sft, settings.dpo):
        trainers.accumulation(stage, machine.devices)
    config = base_config(settings, arguments, locked)
    return settings, config, machine, tokenized_by(settings, arguments.tokenized, locked)


def base_config(
    settings: params.Params, paths: argparse.Namespace, locked: dict[str, Any]
) -> PreTrainedConfig:
    """The config of the base model: of the fetched one, if these params name it, or one in `paths.models`."""
    source = settings.model.source
    if is_fetched(settings, locked) and (paths.base / "config.json").exists():
        return AutoConfig.from_pretrained(paths.base, local_files_only=True)
    shipped = paths.models / f"{source.repo if isinstance(source, params.HubSource) else '-'}.json"
    if shipped.exists():
        return AutoConfig.from_pretrained(shipped, local_files_only=True)
    raise InputError(
        f"{paths.base}: the base model of {paths.params} is not there, nor its config as {shipped}; "
        "`dvc repro fetch_model`, with these params as params.yaml, fetches it and needs no GPU"
    )


def tokenized_by(settings: params.Params, folder: Path, locked: dict[str, Any]) -> Tokenized:
    """The folders of rows that dvc.lock says were tokenized with these params."""
    tokenized: Tokenized = {}
    for name, data in (("sft", "sft"), ("dpo", "preferences")):
        values = {
            "seed": settings.seed,
            "model.chat_template": settings.model.chat_template,
            f"data.{data}": getattr(settings.data, data).model_dump(),
            f"tokenize.{name}": getattr(settings.tokenize, name).model_dump(),
        }
        is_made = is_fetched(settings, locked) and made_with(locked, f"tokenize_{name}", values)
        is_there = is_made and any((folder / name).glob("train-*.arrow"))
        tokenized[name] = folder / name if is_there else None
    return tokenized


def is_fetched(settings: params.Params, locked: dict[str, Any]) -> bool:
    return made_with(locked, "fetch_model", {"model.source": settings.model.source.model_dump()})


def made_with(locked: dict[str, Any], stage: str, values: dict[str, Any]) -> bool:
    """Whether dvc.lock says that a stage's outs were made with these params."""
    recorded = locked.get(stage, {}).get("params", {}).get("params.yaml", {})
    return all(recorded.get(key) == value for key, value in values.items())


def show(settings: params.Params, config: PreTrainedConfig, machine: Machine, tokenized: Tokenized) -> bool:
    """Print what a run needs and how that is derived; returns whether every stage fits."""
    stages, work, counts = needs(settings, config, machine, tokenized)
    show_subject(settings, machine, work, counts)
    show_memory(stages, machine)
    show_time(settings, stages)
    show_derivation(settings, stages, work, machine)
    show_disk(settings, machine, counts, work)
    too_large = [need for need in stages if need.memory > machine.memory]
    for need in too_large:
        advice = remedy(settings, config, machine, tokenized, need.stage)
        print(
            f"{need.stage} does not fit: {need.memory / GIB:.1f} GiB of {machine.memory / GIB:.1f}; {advice}"
        )
    return not too_large


def show_subject(
    settings: params.Params, machine: Machine, work: dict[str, Work], counts: dict[str, int]
) -> None:
    model = settings.model
    held_in = model.quantization if model.quantization != "none" else model.dtype
    print(
        f"{machine.devices} × {machine.name}: {machine.memory / GIB:.1f} GiB and "
        f"{machine.flops / 1e12:.3g} TFLOP/s in {model.dtype} each, of which {machine.utilization:.0%} are "
        "taken to be reached\n"
        f"model: {counts['frozen'] + counts['trained']:,} weights, of which {counts['trained']:,} are "
        f"trained ({settings.lora.method}); base held in {held_in}\n"
        f"sft: {work['sft'].source}\ndpo: {work['dpo'].source}\n"
    )


def show_memory(stages: list[Need], machine: Machine) -> None:
    print(f"{'GiB a device':12} {'weights':>9} {'trained':>9} {'activations':>12} {'process':>9} {'sum':>9}")
    for need in stages:
        print(
            f"{need.stage:12} {need.weights / GIB:9.2f} {need.trained / GIB:9.2f} "
            f"{need.activations / GIB:12.2f} {need.process / GIB:9.2f} {need.memory / GIB:9.2f}"
            + ("" if need.memory <= machine.memory else "  DOES NOT FIT")
        )


def show_time(settings: params.Params, stages: list[Need]) -> None:
    print(
        f"\n{'time':12} {'steps':>9} {'tokens':>13} {'PFLOP':>12} {'hours':>9} {'kernels':>9}   "
        "(kernels: hours of launching them)"
    )
    for need in stages:
        print(
            f"{need.stage:12} {need.steps or '':>9} {need.tokens:13,.0f} {need.flops / 1e15:12,.4g} "
            f"{need.computing / 3600:9.3f} {need.starting / 3600:9.3f}"
        )
    tokens, flops = sum(need.tokens for need in stages), sum(need.flops for need in stages)
    computing = sum(need.computing for need in stages)
    expected = sum(max(need.computing, need.starting) for need in stages)
    print(f"{'all':12} {'':9} {tokens:13,.0f} {flops / 1e15:12,.4g} {computing / 3600:9.3f}")
    if expected > 1.05 * computing:
        print(
            f"expected: {expected / 3600:.1f} hours, for each stage the larger of both: kernels take longer "
            "to launch than to compute; a larger micro_batch_size helps, for evaluate a larger batch_texts"
        )
    if uncounted := [name for name in settings.evaluate.benchmarks if name not in BENCHMARKS]:
        print(f"evaluate is without {', '.join(uncounted)}, whose size is not known")
    print()


def show_derivation(
    settings: params.Params, stages: list[Need], work: dict[str, Work], machine: Machine
) -> None:
    """How the FLOPs of sft and dpo become hours."""
    for need in (need for need in stages if need.stage in work):
        computed = work[need.stage]
        tokens = computed.tokens + computed.measured
        hours = need.flops / (machine.devices * machine.flops * machine.utilization) / 3600
        print(
            f"{need.stage}: {computed.steps:,} steps × {getattr(settings, need.stage).global_batch_size} = "
            f"{computed.tokens:,.0f} tokens, + {computed.measured:,.0f} measured without a backward pass; "
            f"{need.flops / tokens / 1e9:.2f} GFLOP a token; {need.flops / 1e15:,.4g} PFLOP ÷ "
            f"({machine.devices} × {machine.flops / 1e12:.3g} TFLOP/s × {machine.utilization:.2f}) = "
            f"{hours:.3f} hours; {computed.micro_batches:,.0f} micro-batches a device"
        )


def show_disk(
    settings: params.Params, machine: Machine, counts: dict[str, int], work: dict[str, Work]
) -> None:
    """What outs, DVC's cache and checkpoints take."""
    full = settings.lora.method == "full"
    base = (counts["frozen"] + (counts["trained"] if full else 0)) * 2
    trained = counts["trained"] * (2 if full and settings.model.dtype == "bfloat16" else 4)
    # a row of sft also holds its labels
    rows = 2 * TOKEN.itemsize * work["sft"].held + TOKEN.itemsize * work["dpo"].held
    outs = base + 2 * trained + rows
    # DeepSpeed also saves the weights as its optimizer has them
    checkpoint = counts["trained"] * (WEIGHT + ADAM + (2 * WEIGHT if machine.devices > 1 else 0))
    saved = (checkpoints.KEPT + 1) * checkpoint
    free = shutil.disk_usage(".").free
    fits = 2 * outs + saved < free
    print(
        f"disk: {outs / GIB:.1f} GiB of outs, as much again in DVC's cache where the file system cannot "
        f"share it, {saved / GIB:.1f} GiB of a stage's checkpoints at most; {free / GIB:.1f} GiB are free "
        "here" + ("" if fits else ": NOT ENOUGH; free some, or `dvc cache dir` another disk")
    )


def remedy(
    settings: params.Params,
    config: PreTrainedConfig,
    machine: Machine,
    tokenized: Tokenized,
    stage: str,
) -> str:
    """The first changes of params with which a stage fits, in words."""
    tried = []
    for key, value in CHANGES[stage]:
        section, name = key.split(".")
        # all weights are trained in float32, whatever the quantization
        is_void = key == "model.quantization" and settings.lora.method == "full"
        if is_void or getattr(getattr(settings, section), name) == value:
            continue
        changed = getattr(settings, section).model_copy(update={name: value})
        settings = settings.model_copy(update={section: changed})
        tried.append(f"{key}: {str(value).lower()}")
        stages, _, _ = needs(settings, config, machine, tokenized)
        after = next(need for need in stages if need.stage == stage)
        if after.memory <= machine.memory:
            return f"with {' and '.join(tried)} it takes {after.memory / GIB:.1f} GiB"
    insufficient = f"{' and '.join(tried)} is not enough; " if tried else ""
    shorter = f"lower tokenize.{stage}.max_length, or " if stage in ("sft", "dpo") else ""
    return f"{insufficient}{shorter}take devices with more memory"
