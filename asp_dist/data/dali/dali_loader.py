"""The DALI backend: one pipeline per epoch over the rank's own part of the order; DALI shuffles nothing itself."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from asp_dist.data.bad_files import pipeline_error
from asp_dist.data.base import Batch, LoaderOptions, TrainLoader, ValLoader
from asp_dist.data.order import EpochPlan
from asp_dist.data.samples import IndexArray, Samples

if TYPE_CHECKING:
    from asp_dist.data.dali.pipeline import Placement


class PipelineRun:
    """A DALI pipeline run for exactly `batches` batches: nothing is prefetched that nobody consumes.

    Args:
        pipeline: a built DALI pipeline whose outputs are images and positions.
        batches: how many batches will be taken.
        prefetch: the depth of the pipeline's queue, `batches` at most.
        tar: whether the pipeline reads shards.
        channels_last: whether the pipeline's images are [B, H, W, 3].
    """

    def __init__(self, pipeline: Any, batches: int, prefetch: int, tar: bool, channels_last: bool) -> None:
        self.pipeline, self.batches, self.prefetch, self.tar = pipeline, batches, prefetch, tar
        self.channels_last = channels_last
        self.taken = 0

    def advance(self) -> Any:
        """The next batch as DALI's tensor lists."""
        if self.taken + self.prefetch <= self.batches:
            self.pipeline.schedule_run()  # the first call schedules `prefetch` batches
        self.taken += 1
        if self.pipeline.device_id is None:
            return self.pipeline.outputs()
        # In order on torch's stream: the host does not wait for the images.
        return self.pipeline.outputs(torch.cuda.current_stream(self.pipeline.device_id).cuda_stream)

    def next(self) -> tuple[Tensor, IndexArray]:
        """Images float32 [B, 3, H, W] on the pipeline's device, and their positions in the file list, int64 [B]."""
        images, places = self.advance()
        tensor: Tensor = from_dlpack(images.as_tensor())
        if self.channels_last:
            tensor = tensor.permute(0, 3, 1, 2)
        from asp_dist.data.dali.readers import positions

        return tensor, positions(places, self.tar)


def build(pipeline: Any, samples: Samples, part: IndexArray, *, where: str) -> None:
    """Build a pipeline over `part`, which opens every shard.

    Raises:
        DataError: a shard is not there.
        DataReadError: a shard that cannot be read now.
    """
    try:
        pipeline.build()
    except RuntimeError as error:
        if samples.shard is None:
            raise
        one_of_each = part[np.unique(samples.shard[part], return_index=True)[1]]
        raise pipeline_error(error, samples, one_of_each, where=where) from error


def serve(
    run: PipelineRun,
    samples: Samples,
    part: IndexArray,
    options: LoaderOptions,
    *,
    first: int,
    size: int,
    where: Callable[[int], str],
) -> Iterator[Batch]:
    """The batches of `part` from position `first` on, `size` samples each; what pads the last one is cut off.

    Args:
        run: the pipeline over `part`, whose next batch is the one at `first`.
        samples: the split.
        part: int64 [M], the samples to serve.
        options: device and prefetch.
        first: a position in `part`.
        size: samples per batch.
        where: rank and place of a batch, by its number in `part`, for messages.

    Raises:
        DataError: a file that does not decode, with its name.
        DataReadError: a file that cannot be read now.
    """
    labels = torch.from_numpy(samples.labels)
    for start in range(first, len(part), size):
        wanted = part[start : start + size]
        try:
            images, positions = run.next()
        except (RuntimeError, MemoryError, OSError) as error:
            ahead = part[start : start + (options.prefetch + 2) * size]
            raise pipeline_error(error, samples, ahead, where=where(start // size)) from error
        real = len(wanted)
        assert np.array_equal(positions[:real], np.arange(start, start + real)), "DALI left the order that it was given"
        own = labels[wanted]
        if options.device.type == "cuda":
            own = own.pin_memory()
        yield images[:real], own.to(options.device, non_blocking=True)


def placement(options: LoaderOptions) -> Placement:
    """Where DALI decodes and augments."""
    from asp_dist.data.dali.pipeline import Placement

    return Placement("gpu" if options.device.type == "cuda" else "cpu", options.channels_last, options.dali)


def pipeline_options(options: LoaderOptions, batch: int, batches: int) -> dict[str, Any]:
    """The arguments of every pipeline."""
    gpu = options.device.type == "cuda"
    return {
        "batch_size": batch,
        "num_threads": options.threads,
        "device_id": (options.device.index or 0) if gpu else None,
        "prefetch_queue_depth": min(options.prefetch, batches),
        "set_affinity": gpu and options.dali.affinity,
    }


class DaliTrain(TrainLoader):
    """Training batches of one rank through DALI; see `TrainLoader`."""

    backend = "dali"

    def __init__(self, samples: Samples, plan: EpochPlan, options: LoaderOptions) -> None:
        super().__init__(samples, plan, options)
        self._run: PipelineRun | None = None

    def topology(self) -> dict[str, Any]:
        """The base's, and the versions of DALI and of torch, which resizes on the CPU."""
        import nvidia.dali

        return {**super().topology(), "DALI": nvidia.dali.__version__, "torch": torch.__version__}

    def _pipeline_state(self) -> str | None:
        if self._run is None or self._run.taken == 0:
            return None
        return base64.b64encode(self._run.pipeline.checkpoint()).decode()

    def _open(self, part: IndexArray, epoch: int, state: str | None, batches: int) -> PipelineRun:
        from asp_dist.data.dali.pipeline import train_pipeline
        from asp_dist.data.dali.readers import reader_of

        assert self.samples is not None
        options = self.options
        key = [options.seed % 2**64, epoch, options.rank, self._first_step]
        arguments = pipeline_options(options, self.plan.micro, batches)
        with reader_of(self.samples, part, self.plan.micro, self.cache) as reader:
            pipeline = train_pipeline(
                reader,
                options.spec_in(epoch),
                options.augment,
                placement(options),
                seed=int(np.random.SeedSequence(key).generate_state(1)[0] >> 1),
                enable_checkpointing=True,
                checkpoint=None if state is None else base64.b64decode(state),
                **arguments,
            )
            build(pipeline, self.samples, part, where=f"rank {options.rank}, epoch {epoch}, step {self._first_step}")
        return PipelineRun(pipeline, batches, arguments["prefetch_queue_depth"], reader.tar, options.channels_last)

    def _batches(self, epoch: int, step: int, pipeline: str | None) -> Iterator[Batch]:
        assert self.samples is not None
        micro, part = self.plan.micro, self._part(epoch, self._first_step)
        skip = (step - self._first_step) * self.plan.accumulate
        batches = len(part) // micro - skip
        if batches == 0:
            return
        self._run = None  # its memory is free before the next one takes its own
        self._run = self._open(part, epoch, pipeline, batches)
        yield from serve(
            self._run,
            self.samples,
            part,
            self.options,
            first=skip * micro,
            size=micro,
            where=lambda batch: (
                f"rank {self.options.rank}, epoch {epoch}, step {self._first_step + batch // self.plan.accumulate}"
            ),
        )

    def close(self) -> None:
        """End the running pipeline."""
        self._run = None


class DaliVal(ValLoader):
    """Validation batches of one rank through DALI; see `ValLoader`."""

    def _batches(self) -> Iterator[Batch]:
        from asp_dist.data.dali.pipeline import val_pipeline
        from asp_dist.data.dali.readers import reader_of

        assert self.samples is not None
        part, size = self.part, self.batch_size
        batches = -(-len(part) // size)
        if batches == 0:
            return
        arguments = pipeline_options(self.options, size, batches)
        with reader_of(self.samples, part, size, self.cache) as reader:
            pipeline = val_pipeline(reader, self.options.spec, placement(self.options), **arguments)
            build(pipeline, self.samples, part, where=f"rank {self.options.rank}, validation batch 0")
        run = PipelineRun(pipeline, batches, arguments["prefetch_queue_depth"], reader.tar, self.options.channels_last)
        yield from serve(
            run,
            self.samples,
            part,
            self.options,
            first=0,
            size=size,
            where=lambda batch: f"rank {self.options.rank}, validation batch {batch}",
        )
