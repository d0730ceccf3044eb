"""What the run that params.yaml describes will need, before it is started: memory, time and disk, on devices that need not be here.

    python -m stages.preflight                                    on what this machine has
    python -m stages.preflight --gpus 4 --gpu h100-80gb           on four of these
    python -m stages.preflight --params recipes/qwen3-4b.yaml --gpus 4 --gpu h100-80gb --utilization 0.4

It prints what each stage takes of a device's memory, its steps, tokens and arithmetic and how these give its hours, and what it writes; exit code 1 if a
stage does not fit, with what to change.
"""

import argparse
import math
import os
import re
import shutil
import sys
from pathlib import Path

import torch
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from transformers import AutoConfig, PreTrainedConfig
from trl.trainer.utils import _PEAK_FLOPS_BY_DEVICE, get_peak_flops

from stages import InputError, checkpoints, command, first_line, modeling, params, training
from stages.estimates import ADAM, BENCHMARKS, CPU, GIB, GPU, WEIGHT, Machine, Need, Work, needs


def machine_of(arguments: argparse.Namespace, dtype: str) -> Machine:
    """Named devices, or what is found here."""
    gpu = arguments.gpu is not None or torch.cuda.is_available()
    count = arguments.gpus or 1
    if arguments.gpu is not None:
        parts = re.fullmatch(r"(.+)-(\d+)gb", arguments.gpu.lower())
        if parts is None:
            raise InputError(f"--gpu: found {arguments.gpu!r}, expected a name and its memory, such as h100-80gb")
        # what a driver leaves of the nominal size; memory that is no HBM gives a sixteenth to error correction
        share = 15 / 16 if re.match(r"(t4|l4|l40|l40s|a10|a10g|a40)\b", parts[1]) else 0.99
        name, memory, flops = arguments.gpu, share * int(parts[2]) * GIB, get_peak_flops(parts[1].replace("-", " "), dtype)
    elif gpu:
        name, memory, count = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory, arguments.gpus or torch.cuda.device_count()
        flops = get_peak_flops(name, dtype)
    else:
        if arguments.gpus:
            raise InputError("--gpus: there is no GPU here; name the kind with --gpu, such as --gpu h100-80gb")
        name, memory, flops = f"{os.cpu_count()} CPU cores", modeling.physical_memory(), training.device_flops(dtype)
    if flops is None:
        known = ", ".join(sorted({device.lower().replace(" ", "-") for device, by_dtype in _PEAK_FLOPS_BY_DEVICE if dtype in by_dtype}))
        print(f"{name}: its speed in {dtype} is not known, and so no hours are; known are {known or 'none in this model.dtype'}\n")
    return Machine(name, count, memory, math.nan if flops is None else flops, gpu, arguments.utilization or (GPU if gpu else CPU).utilization)


def config_of(settings: params.Params, paths: argparse.Namespace, locked: dict) -> PreTrainedConfig:
    """Of the base: of the one that is fetched, if it is the one that the params name, or one that comes with the repository."""
    source = settings.model.source
    if made_with(locked, "fetch_model", {"model.source": source.model_dump()}) and (paths.base / "config.json").exists():
        return AutoConfig.from_pretrained(paths.base, local_files_only=True)
    shipped = paths.models / f"{source.repo if isinstance(source, params.HubSource) else '-'}.json"
    if shipped.exists():
        return AutoConfig.from_pretrained(shipped, local_files_only=True)
    raise InputError(
        f"{paths.base}: the base model of {paths.params} is not there, nor its config as {shipped}; "
        "`dvc repro fetch_model`, with these params as params.yaml, fetches it and needs no GPU"
    )


def read_lock(path: Path) -> dict:
    """dvc.lock, empty if there is none."""
    try:
        return (YAML(typ="safe", pure=True).load(path.read_text()) if path.exists() else None) or {}
    except YAMLError as error:
        raise InputError(f"{path}: not YAML ({first_line(error)}); `git checkout {path}` restores it") from error


def made_with(locked: dict, stage: str, wanted: dict) -> bool:
    """Whether dvc.lock says that a stage's outs were made with these params."""
    recorded = locked.get("stages", {}).get(stage, {}).get("params", {}).get("params.yaml", {})
    return all(recorded.get(key) == value for key, value in wanted.items())


def tokenized_by(settings: params.Params, folder: Path, locked: dict) -> dict[str, Path | None]:
    """Where the rows of sft and dpo lie, if they were made with these params."""
    found: dict[str, Path | None] = {}
    base = made_with(locked, "fetch_model", {"model.source": settings.model.source.model_dump()})
    for name, data in (("sft", "sft"), ("dpo", "preferences")):
        wanted = {
            "seed": settings.seed, "model.chat_template": settings.model.chat_template,
            f"data.{data}": getattr(settings.data, data).model_dump(), f"tokenize.{name}": getattr(settings.tokenize, name).model_dump(),
        }  # fmt: skip
        there = base and made_with(locked, f"tokenize_{name}", wanted) and any((folder / name).glob("train-*.arrow"))
        found[name] = folder / name if there else None
    return found


CHANGES = {
    "sft": (("sft.gradient_checkpointing", True), ("sft.micro_batch_size", 1), ("model.quantization", "nf4")),
    "reference": (("reference.batch_size", 1), ("model.quantization", "nf4")),
    "dpo": (("dpo.gradient_checkpointing", True), ("reference.batch_size", 1), ("dpo.micro_batch_size", 1), ("model.quantization", "nf4")),
    "evaluate": (("evaluate.batch_texts", 1), ("evaluate.batch_tokens", 1), ("model.quantization", "nf4")),
}
"""What lowers a stage's memory, in the order in which it is tried."""


def remedy(settings: params.Params, config: PreTrainedConfig, machine: Machine, tokenized: dict[str, Path | None], stage: str) -> str:
    """The first changes of params with which a stage fits, in words."""
    tried = []
    for key, value in CHANGES[stage]:
        section, name = key.split(".")
        if getattr(getattr(settings, section), name) == value or (key == "model.quantization" and settings.lora.method == "full"):
            continue
        settings = settings.model_copy(update={section: getattr(settings, section).model_copy(update={name: value})})
        tried.append(f"{key}: {str(value).lower()}")
        after = next(need for need in needs(settings, config, machine, tokenized)[0] if need.stage == stage)
        if after.memory <= machine.memory:
            return f"with {' and '.join(tried)} it takes {after.memory / GIB:.1f} GiB"
    rows = f"lower tokenize.{stage}.max_length, or " if stage in ("sft", "dpo") else ""
    return (f"{' and '.join(tried)} is not enough; " if tried else "") + f"{rows}take devices with more memory"


def show(settings: params.Params, config: PreTrainedConfig, machine: Machine, tokenized: dict[str, Path | None]) -> bool:
    """Print all of it; False if a stage does not fit."""
    found, work, counts = needs(settings, config, machine, tokenized)
    print(
        f"{machine.devices} × {machine.name}: {machine.memory / GIB:.1f} GiB and {machine.flops / 1e12:.3g} TFLOP/s in {settings.model.dtype} each, "
        f"of which {machine.utilization:.0%} are taken to be reached\n"
        f"model: {counts['frozen'] + counts['trained']:,} weights, of which {counts['trained']:,} are trained ({settings.lora.method}); base held in "
        f"{settings.model.quantization if settings.model.quantization != 'none' else settings.model.dtype}\n"
        f"sft: {work['sft'].source}\ndpo: {work['dpo'].source}\n"
    )
    print(f"{'GiB a device':12} {'weights':>9} {'trained':>9} {'activations':>12} {'process':>9} {'sum':>9}")
    for need in found:
        parts = (need.weights, need.trained, need.activations, need.process, need.memory)
        print(f"{need.stage:12} {parts[0] / GIB:9.2f} {parts[1] / GIB:9.2f} {parts[2] / GIB:12.2f} {parts[3] / GIB:9.2f} {parts[4] / GIB:9.2f}" + ("" if need.memory <= machine.memory else "  DOES NOT FIT"))
    print(f"\n{'time':12} {'steps':>9} {'tokens':>13} {'PFLOP':>12} {'hours':>9} {'kernels':>9}   (kernels: the hours that starting them takes)")
    for need in found:
        print(f"{need.stage:12} {need.steps or '':>9} {need.tokens:13,.0f} {need.flops / 1e15:12,.4g} {need.computing / 3600:9.3f} {need.starting / 3600:9.3f}")
    computing, likely = sum(need.computing for need in found), sum(max(need.computing, need.starting) for need in found)
    print(f"{'all':12} {'':9} {sum(need.tokens for need in found):13,.0f} {sum(need.flops for need in found) / 1e15:12,.4g} {computing / 3600:9.3f}")
    if likely > 1.05 * computing:
        print(f"expected: {likely / 3600:.1f} hours, in each stage the larger of both: kernels take longer to start than to compute; a larger micro_batch_size helps, and for evaluate a larger batch_texts")
    if uncounted := [name for name in settings.evaluate.benchmarks if name not in BENCHMARKS]:
        print(f"evaluate is without {', '.join(uncounted)}, whose size is not known")
    print()
    derivation(settings, found, work, machine)
    disk(settings, machine, counts, work)
    problems = [need for need in found if need.memory > machine.memory]
    for need in problems:
        print(f"{need.stage} does not fit: {need.memory / GIB:.1f} GiB of {machine.memory / GIB:.1f}; {remedy(settings, config, machine, tokenized, need.stage)}")
    return not problems


def derivation(settings: params.Params, found: list[Need], work: dict[str, Work], machine: Machine) -> None:
    for need in found:
        if need.stage in work:
            own = work[need.stage]
            print(
                f"{need.stage}: {own.steps:,} steps × {getattr(settings, need.stage).global_batch_size} = {own.tokens:,.0f} tokens, + {own.measured:,.0f} measured without a backward pass; "
                f"{need.flops / (own.tokens + own.measured) / 1e9:.2f} GFLOP a token; {need.flops / 1e15:,.4g} PFLOP ÷ ({machine.devices} × {machine.flops / 1e12:.3g} TFLOP/s × "
                f"{machine.utilization:.2f}) = {need.flops / (machine.devices * machine.flops * machine.utilization) / 3600:.3f} hours; "
                f"{own.micro_batches:,.0f} micro-batches a device"
            )


def disk(settings: params.Params, machine: Machine, counts: dict[str, int], work: dict[str, Work]) -> None:
    """What outs, DVC's cache and checkpoints take, in GiB."""
    base = (counts["frozen"] + (counts["trained"] if settings.lora.method == "full" else 0)) * 2
    trained = counts["trained"] * (2 if settings.lora.method == "full" and settings.model.dtype == "bfloat16" else 4)
    outs = base + 2 * trained + 8 * work["sft"].held + 4 * work["dpo"].held
    # under DeepSpeed, the weights once more as the optimizer has them
    saved = (checkpoints.KEPT + 1) * counts["trained"] * (WEIGHT + ADAM + (2 * WEIGHT if machine.devices > 1 else 0))
    free = shutil.disk_usage(".").free
    print(
        f"disk: {outs / GIB:.1f} GiB of outs, as much again in DVC's cache where the file system cannot share it, {saved / GIB:.1f} GiB of a stage's checkpoints at most; "
        f"{free / GIB:.1f} GiB are free here" + ("" if 2 * outs + saved < free else ": NOT ENOUGH; free some, or `dvc cache dir` another disk")
    )


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--gpu", help="name and memory of the devices, such as h100-80gb; those found here if left out")
    found.add_argument("--gpus", type=int, help="how many of them")
    found.add_argument("--utilization", type=float, help="share of their speed that is reached; 0.4 of GPUs if left out")
    for name, path in (("params", "params.yaml"), ("base", "models/base"), ("tokenized", "data/tokenized"), ("models", "configs/models"), ("lock", "dvc.lock")):
        found.add_argument(f"--{name}", type=Path, default=Path(path), help=f"{path} if left out")
    return found


def prepared(arguments: argparse.Namespace) -> tuple[params.Params, PreTrainedConfig, Machine, dict[str, Path | None]]:
    """What `needs` takes."""
    if arguments.gpus is not None and arguments.gpus < 1:
        raise InputError(f"--gpus: found {arguments.gpus}, expected at least 1")
    if arguments.utilization is not None and not 0 < arguments.utilization <= 1:
        raise InputError(f"--utilization: found {arguments.utilization}, expected a share, more than 0 and at most 1")
    settings = params.load(arguments.params)
    locked = read_lock(arguments.lock)
    machine = machine_of(arguments, settings.model.dtype)
    for name in ("sft", "dpo"):
        training.accumulation(getattr(settings, name), machine.devices)
    return settings, config_of(settings, arguments, locked), machine, tokenized_by(settings, arguments.tokenized, locked)


def main() -> None:
    if not show(*prepared(parser().parse_args())):
        sys.exit(1)


if __name__ == "__main__":
    command(main)
