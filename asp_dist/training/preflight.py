"""What can be known to be wrong before anything starts: no Ray, no GPU, no training."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from timm.data import resolve_model_data_config
from torch import nn

from asp_dist.checkpoint.folder_lock import check_free
from asp_dist.checkpoint.record import check_run_dir, run_dir, with_absolute_paths
from asp_dist.config import Config
from asp_dist.data import DataInfo, inspect_data
from asp_dist.data.images import build_spec
from asp_dist.errors import UserError, check
from asp_dist.models import build_model, check_model_name
from asp_dist.tracking.further import check_further
from asp_dist.training import build
from asp_dist.training.run import count_steps
from asp_dist.training.warm_start import check_start
from asp_dist.training.world import group_sizes, is_one_rank, share_problem


@dataclass(frozen=True)
class Preflight:
    """What was found.

    Args:
        data: the data set.
        steps_per_epoch: optimizer steps per epoch.
        total_steps: optimizer steps of the run.
        world_size: number of workers.
        resumes: whether the folder contains this run already.
    """

    data: DataInfo
    steps_per_epoch: int
    total_steps: int
    world_size: int
    resumes: bool


def preflight(config: Config, data: DataInfo | None = None) -> Preflight:
    """Check that `config` can run.

    Args:
        config: the run.
        data: what `inspect_data` found, if that is known already.

    Raises:
        UserError: unknown model, optimizer or schedule; missing or unfit data; a budget that cannot be met; a batch that
            does not divide among the workers; a folder with another run.
    """
    config = with_absolute_paths(config)
    check_model_name(config.model.name)
    build.check_optimizer(config.optimizer.name)
    check_further(config.tracking.also)
    data = look_at_data(config) if data is None else data
    resumes = check_run_dir(config) is not None
    if not resumes:
        check_start(config)
    else:
        check_free(run_dir(config))
    world_size = planned_world_size(config)
    check_batch(config, data)
    steps_per_epoch = data.num_train // config.data.batch_size
    total_steps = count_steps(config, steps_per_epoch)
    check_budget(config, data, total_steps, steps_per_epoch)
    return Preflight(data, steps_per_epoch, total_steps, world_size, resumes)


def look_at_data(config: Config) -> DataInfo:
    """`inspect_data`, where a store that does not answer is the user's to look at: nothing has started yet."""
    try:
        return inspect_data(config.data)
    except OSError as error:
        if "://" not in config.data.root:
            raise
        raise UserError(
            f"data.root = {config.data.root.partition('?')[0]}: the store does not answer ({error}): check the network, and "
            "AWS_ENDPOINT_URL for a store of one's own"
        ) from error


def planned_world_size(config: Config) -> int:
    """The number of workers that the configuration and the environment ask for: of an elastic group, the largest one's."""
    if is_one_rank(config):
        return int(os.environ["WORLD_SIZE"])
    if config.cluster.mode != "ray":
        return 1
    return max(group_sizes(config), default=config.cluster.num_workers)


def check_batch(config: Config, data: DataInfo) -> None:
    """Raise `UserError` unless the batch fits the data, and can be dealt to some number of workers that the run may have."""
    batch = config.data.batch_size
    check(
        batch <= data.num_train,
        f"data.batch_size = {batch} is more than the {data.num_train} training images of {config.data.root}",
    )
    workers, cluster = planned_world_size(config), config.cluster
    problem = share_problem(config, workers)
    if problem and workers == cluster.num_workers != (cluster.min_workers or workers) and not is_one_rank(config):
        problem += f"; nor among any fewer, down to cluster.min_workers = {cluster.min_workers}: lower it, or change the batch"
    check(not problem, problem)


def check_forward(config: Config, model: nn.Module, size: tuple[int, int]) -> None:
    """Raise `UserError` unless `model` trains on the images that a worker gets at once, by a pass on the meta device."""
    images = config.data.batch_size // (planned_world_size(config) * config.training.accumulate)
    tensors = {name: tensor.detach().to("meta") for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    batch = torch.empty((images, 3, *size), device="meta")
    try:
        with torch.no_grad():
            torch.func.functional_call(model.train(), tensors, (batch,), tie_weights=True)
    except (ValueError, RuntimeError, AssertionError, IndexError) as error:
        if isinstance(error, NotImplementedError) or "meta" in str(error).lower():
            return  # a forward pass that looks at values, which the meta device has not
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{config.model.name} does not train on {images} image(s) of {size[0]}×{size[1]} at once, as each of "
            f"{planned_world_size(config)} worker(s) would get ({reason}): change data.batch_size, cluster.num_workers, "
            "training.accumulate or data.input_size"
        ) from error


def check_budget(config: Config, data: DataInfo, total_steps: int, steps_per_epoch: int) -> None:
    """Raise `UserError` unless the network can be built, and pruned to the budget."""
    with torch.random.fork_rng(devices=[]):
        model = build_model(config.model, len(data.classes), config.data.input_size)
    height, width = build_spec(config.data, resolve_model_data_config(model)).size
    for size in {(height, width), *((side, side) for side in config.data.progressive_sizes)}:
        check_forward(config, model, size)
    optimizer = build.build_optimizer(build.scaled(config), model)
    build.build_scheduler(config.schedule, optimizer, steps_per_epoch)
    pruner = build.build_pruner(config, model, optimizer, total_steps=total_steps, input_size=(3, height, width))
    if pruner is not None:
        pruner.remove()
    check(
        not (config.training.parallel == "fsdp" and config.optimizer.clip_grad and config.optimizer.clip_mode != "norm"),
        f"optimizer.clip_mode = {config.optimizer.clip_mode} is not supported with training.parallel = fsdp: choose norm",
    )
    if config.training.grad_checkpointing:
        build.checkpoint_gradients(model)
    if config.training.parallel == "fsdp" and config.training.ema_decay is not None:
        raise UserError("training.ema_decay is not supported with training.parallel = fsdp yet: choose ddp")
