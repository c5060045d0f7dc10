"""The configuration of a run: frozen, typed dataclasses in the order of the YAML files.

Values are checked on construction, so a wrong one fails before anything starts. Sparsity and density are fractions in [0, 1];
durations are in epochs unless the name says otherwise. The pruning options are the library's own objects.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from asp_dist.errors import check, check_address, check_fraction, check_positive
from asp_dist.pruning import Budget, Control, Hard, Operator, Pattern, Power, Ramp, Select, Soft, SparsityLoss, Track

AutoAugment = Literal["none", "randaugment", "trivialaugment", "autoaugment", "augmix"]
Backend = Literal["dali", "torch", "synthetic"]
DataFormat = Literal["auto", "folder", "manifest", "shards"]
Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class ModelConfig:
    """The network: any name in timm's registry, which `asp_dist.models` adds the paper's networks to.

    Args:
        name: timm model name, such as ``resnet50``.
        pretrained: start from timm's published weights (needs a network), or from `weights` if that is set.
        weights: a local ``.safetensors`` or ``.pth`` file to start from, such as another run's ``model.safetensors``.
        new_classifier: train a new classifier on trained weights that have none for the data's classes; False: an error.
        kwargs: further arguments of ``timm.create_model``, such as ``drop_path_rate``.
    """

    name: str = "resnet18"
    pretrained: bool = False
    weights: str | None = None
    new_classifier: bool = False
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of the training images. DALI runs it, on the CPU or the GPU.

    Args:
        scale: smallest and largest share of the area that a random resized crop keeps.
        ratio: smallest and largest aspect ratio of that crop.
        hflip: probability of a horizontal flip.
        vflip: probability of a vertical flip.
        color_jitter: strength of brightness, contrast and saturation jitter; 0 turns it off.
        pad: pixels of zeros around the image, out of which a crop of the input's size is taken, as is usual for CIFAR; the
            image is resized to that size first, and `scale` and `ratio` are left alone. 0: a random resized crop.
        policy: automatic augmentation policy; ``augmix`` with the torch backend alone.
        policy_ops: RandAugment's number of operations per image.
        policy_magnitude: RandAugment's magnitude, 0 to 30; AugMix's as well.
        policy_std: standard deviation of that magnitude, on timm's scale of 0 to 10; above 100: uniform up to the magnitude.
        policy_prob: probability that each chosen operation of RandAugment is applied; timm's recipes have 0.5.
        policy_increasing: use operations of RandAugment that all get stronger with the magnitude (timm's ``inc1``).
        erase: probability of random erasing.
        erase_mode: what fills the rectangle: the mean color (``const``), a random color, or a random one in each pixel; the
            latter two by timm on the batch.
        erase_count: rectangles at most, by timm.
        repeats: repeated augmentation: how often each image appears in a batch's pool (1 is off).
        mixup: alpha of mixup (0 is off), by timm on the batch.
        cutmix: alpha of cutmix (0 is off), by timm on the batch.
        mixup_prob: share of the batches that are mixed.
        mixup_switch_prob: share of those that get cutmix, where both are on.
        mixup_off_epoch: epoch from which none is mixed; 0: never.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.0
    pad: int = 0
    policy: AutoAugment = "none"
    policy_ops: int = 2
    policy_magnitude: int = 9
    policy_std: float = 0.0
    policy_prob: float = 1.0
    policy_increasing: bool = True
    erase: float = 0.0
    erase_mode: Literal["const", "rand", "pixel"] = "const"
    erase_count: int = 1
    repeats: int = 1
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_off_epoch: int = 0

    def __post_init__(self) -> None:
        for name in ("hflip", "vflip", "erase", "policy_prob", "mixup_prob", "mixup_switch_prob"):
            check_fraction(f"data.augment.{name}", getattr(self, name))
        low, high = self.scale
        check(0 < low <= high <= 1, f"data.augment.scale = {self.scale} must satisfy 0 < low <= high <= 1")
        low, high = self.ratio
        check(0 < low <= high, f"data.augment.ratio = {self.ratio} must satisfy 0 < low <= high")
        check(self.mixup_off_epoch >= 0, f"data.augment.mixup_off_epoch = {self.mixup_off_epoch} must not be negative")
        check(self.pad >= 0, f"data.augment.pad = {self.pad} must not be negative")
        check(self.policy_std >= 0, f"data.augment.policy_std = {self.policy_std} must not be negative")
        check(self.erase_count >= 1, f"data.augment.erase_count = {self.erase_count} must be at least 1")
        check(self.repeats >= 1, f"data.augment.repeats = {self.repeats} must be at least 1")
        check(
            0 <= self.policy_magnitude <= 30,
            f"data.augment.policy_magnitude = {self.policy_magnitude} is outside 0..30",
        )


@dataclass(frozen=True)
class DaliConfig:
    """How DALI uses a GPU; nothing here has an effect on the CPU. What is best depends on the machine: try.

    Args:
        decoder_load: share of the images that the hardware decoder takes, on GPUs that have one; None: DALI's default.
        preallocate: width and height in pixels of the largest image, for the hardware decoder's memory; for ImageNet NVIDIA
            gives 5980 and 6430 (its ConvNets examples). None: the memory grows while the first batches are decoded.
        affinity: keep each worker's decoding threads on the cores near its GPU.
    """

    decoder_load: float | None = None
    preallocate: tuple[int, int] | None = None
    affinity: bool = False

    def __post_init__(self) -> None:
        load = self.decoder_load
        check(load is None or 0.0 <= load <= 1.0, f"data.dali.decoder_load = {load} is outside [0, 1]")
        sides = self.preallocate or (1, 1)
        check(min(sides) >= 1, f"data.dali.preallocate = {list(sides)}: give width and height in pixels, at least 1 each")


@dataclass(frozen=True)
class DataConfig:
    """The images and how they reach the network.

    Args:
        root: the data set: a folder with ``train/CLASS/*`` and ``val/CLASS/*``, manifests, or tar shards. Manifests and shards
            may lie in an object store: ``s3://bucket/imagenet``.
        cache: folder on each node that keeps copies of the images of an object store, filled in the first epoch.
        cache_gb: what the cache may take up, in 10^9 bytes; None: no limit.
        cache_keep: keep the cache after the end of the run, for others.
        backend: ``dali`` (default), ``torch`` (timm's loader) or ``synthetic`` (random tensors that cost nothing).
        format: how `root` is laid out; ``auto`` looks.
        train: name of the training split's folder, manifest or shard prefix under `root`.
        val: the same for the validation split.
        select_fraction: share of the training images that is held out, never trained on: the validations of the epochs, and
            ``output.select``, look at these, and the validation split is looked at once, at the end. 0: it chooses itself.
        batch_size: images per optimizer step, over all workers and accumulation steps.
        eval_batch_size: images per worker in a validation batch; None: the training batch per worker.
        input_size: image side in pixels; None: from the model's timm data config.
        progressive_sizes: image sides of the training images over the epochs, spread evenly; empty: `input_size`.
        threads: decoding threads per worker; None: from the CPUs that the worker may use.
        prefetch: batches that the pipeline works ahead.
        synthetic_samples: (training, validation) samples of the synthetic source.
        synthetic_classes: number of classes of the synthetic source.
        augment: augmentation of the training images.
        dali: how DALI uses a GPU.
    """

    root: str = "data/digits"
    cache: str | None = None
    cache_gb: float | None = None
    cache_keep: bool = True
    backend: Backend = "dali"
    format: DataFormat = "auto"
    train: str = "train"
    val: str = "val"
    select_fraction: float = 0.0
    batch_size: int = 64
    eval_batch_size: int | None = None
    input_size: int | None = None
    progressive_sizes: tuple[int, ...] = ()
    threads: int | None = None
    prefetch: int = 2
    synthetic_samples: tuple[int, int] = (1024, 256)
    synthetic_classes: int = 10
    augment: AugmentConfig = AugmentConfig()
    dali: DaliConfig = DaliConfig()

    def __post_init__(self) -> None:
        check_address("data.root", self.root)
        check_fraction("data.select_fraction", self.select_fraction, upper_open=True)
        check(
            self.select_fraction == 0 or self.backend != "synthetic",
            "data.select_fraction holds out images, and data.backend = synthetic has none: leave it out",
        )
        check(self.batch_size >= 1, f"data.batch_size = {self.batch_size} must be at least 1")
        for name in ("eval_batch_size", "input_size", "threads", "prefetch", "synthetic_classes", "cache_gb"):
            check_positive(f"data.{name}", getattr(self, name))
        check(
            self.augment.policy != "augmix" or self.backend != "dali",
            "data.augment.policy = augmix is timm's, and DALI has no such thing: set data.backend to torch, or leave it out",
        )
        check(
            self.cache is None or "://" in self.root,
            f"data.cache = {self.cache} keeps copies of an object store's images, but data.root = {self.root} is a folder: "
            "leave data.cache out",
        )
        check(self.cache is None or "://" not in self.cache, f"data.cache = {self.cache} must be a folder of the node")


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, by its name in timm's registry (``sgd`` is Nesterov SGD, ``momentum`` is not).

    Args:
        name: any of ``timm.optim.list_optimizers()``.
        lr: learning rate at the start of the schedule, after warm-up.
        lr_base_size: with a value, `lr` is for a batch of so many images, and scaled to the run's: in proportion, or with the
            root for optimizers that adapt their rates, as in timm.
        weight_decay: weight decay; timm keeps it off biases and norms.
        momentum: momentum, or the first beta.
        layer_decay: factor on the rate from each group of layers to the one before it, by timm's grouping; None: one rate.
        kwargs: further arguments of the optimizer.
        clip_grad: what gradients are clipped at; None: no clipping.
        clip_mode: ``norm``: the norm of all gradients; ``value``: each number; ``agc``: each unit's norm, as a share of its
            weights' norm, but for the classifier (adaptive gradient clipping, arXiv 2102.06171).
    """

    name: str = "sgd"
    lr: float = 0.1
    lr_base_size: int | None = None
    weight_decay: float = 5e-4
    momentum: float = 0.9
    layer_decay: float | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    clip_grad: float | None = None
    clip_mode: Literal["norm", "value", "agc"] = "norm"

    def __post_init__(self) -> None:
        check(self.lr > 0, f"optimizer.lr = {self.lr} must be greater than 0")
        check_positive("optimizer.clip_grad", self.clip_grad)
        check_positive("optimizer.lr_base_size", self.lr_base_size)
        check_fraction("optimizer.layer_decay", self.layer_decay)
        check_positive("optimizer.layer_decay", self.layer_decay)


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate's schedule, by its name in timm (``cosine``, ``step``, ``multistep``, ``poly``, ...).

    Args:
        name: timm scheduler name.
        epochs: length of the training in epochs.
        warmup_epochs: epochs of linear warm-up, inside `epochs`.
        warmup_lr: learning rate at the start of the warm-up.
        min_lr: learning rate at the end.
        decay_epochs: epochs between decays, or the milestones of ``multistep``.
        decay_rate: factor at each decay.
    """

    name: str = "cosine"
    epochs: int = 12
    warmup_epochs: float = 0.0
    warmup_lr: float = 1e-5
    min_lr: float = 0.0
    decay_epochs: tuple[float, ...] = (30.0,)
    decay_rate: float = 0.1

    def __post_init__(self) -> None:
        check(self.epochs >= 1, f"schedule.epochs = {self.epochs} must be at least 1")
        check(
            0 <= self.warmup_epochs < self.epochs,
            f"schedule.warmup_epochs = {self.warmup_epochs} must lie in [0, schedule.epochs = {self.epochs})",
        )


@dataclass(frozen=True)
class TrainingConfig:
    """The training loop.

    Args:
        seed: seed of the weights, the order of the samples and the augmentation.
        device: ``auto`` (CUDA where there is some, else the CPU), ``cpu`` or ``cuda``.
        precision: autocast type of forward and backward; ``float16`` uses a gradient scaler.
        channels_last: keep images and convolutions in channels_last memory order.
        compile: compile the model with ``torch.compile``.
        accumulate: micro-batches per optimizer step.
        loss: ``cross_entropy``, or ``bce``, binary cross-entropy on each class (Wightman et al., arXiv 2110.00476).
        bce_threshold: targets above it are 1 for ``bce``, others 0; None: as mixup and smoothing make them.
        label_smoothing: label smoothing, in [0, 1).
        ema_decay: decay of the exponential moving average of the weights; None: no average is kept.
        ema_warmup: let the decay rise over the first steps, so that short runs profit too.
        ema_start: optimizer steps before the average begins; until then it is the weights.
        grad_checkpointing: compute activations again in the backward pass instead of keeping them: less memory, more time.
        sync_batch_norm: use batch norm statistics of all workers.
        parallel: ``ddp`` (replicated weights) or ``fsdp`` (sharded by ``fully_shard``).
        eval_every: epochs between validations; the last epoch is always validated.
        log_every: optimizer steps between logged rows.
        max_bad_steps: steps with a non-finite loss or gradient in a row that end the run.
        patience: end after so many epochs without a better validation at the budget; None: never. The run is then finished.
        max_steps: end after this many optimizer steps, regardless of the epochs; for trials.
        max_minutes: stop so many minutes after the start, with a checkpoint and exit code 75; the same command goes on.
        profile_steps: steps that rank 0 profiles, after the first ones; see ``train --profile``. 0: none.
    """

    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Precision = "float32"
    channels_last: bool = False
    compile: bool = False
    accumulate: int = 1
    loss: Literal["cross_entropy", "bce"] = "cross_entropy"
    bce_threshold: float | None = None
    label_smoothing: float = 0.0
    ema_decay: float | None = None
    ema_warmup: bool = True
    ema_start: int = 0
    grad_checkpointing: bool = False
    sync_batch_norm: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    eval_every: int = 1
    log_every: int = 10
    max_bad_steps: int = 10
    patience: int | None = None
    max_steps: int | None = None
    max_minutes: float | None = None
    profile_steps: int = 0

    def __post_init__(self) -> None:
        check(self.profile_steps >= 0, f"training.profile_steps = {self.profile_steps} must not be negative")
        check(self.ema_start >= 0, f"training.ema_start = {self.ema_start} must not be negative")
        for name in ("accumulate", "eval_every", "log_every", "max_bad_steps", "patience", "max_steps", "max_minutes"):
            check_positive(f"training.{name}", getattr(self, name))
        check_fraction("training.bce_threshold", self.bce_threshold)
        check_fraction("training.label_smoothing", self.label_smoothing, upper_open=True)
        check_fraction("training.ema_decay", self.ema_decay, upper_open=True)


@dataclass(frozen=True)
class BudgetConfig(Budget):
    """The budget that the network is pruned to; with none of sparsity, density and count: 90 % sparsity.

    Args:
        cost: see `Budget`, as for the next five.
        sparsity: share of the prunable layers' cost to save, in [0, 1).
        density: share of it to keep, in (0, 1].
        count: absolute limit, in weights, multiply-adds or bytes.
        bound: ``equal`` or ``at_most``.
        scope: over the whole ``network``, or for each ``layer`` on its own.
        also: further budgets, met at the same time.
    """

    also: tuple[Budget, ...] = ()

    def __post_init__(self) -> None:
        self.all()

    def all(self) -> tuple[Budget, ...]:
        """The budgets, this one first."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(Budget)}
        if self.sparsity is self.density is self.count is None:
            values["sparsity"] = 0.9
        return (Budget(**values), *self.also)


@dataclass(frozen=True)
class PruningConfig:
    """How the network is pruned to the budget; see `asp_dist.pruning.Pruner`.

    Args:
        enabled: False trains the dense network.
        control: what moves the thresholds: ``loss`` (the adaptive sparsity loss, arXiv 2006.02768) or ``track`` (the budget
            holds at every step).
        loss: options of ``control: loss``.
        track: options of ``control: track``.
        ramp: the target over the training; its total_steps follow from the schedule.
        select: which layers are pruned.
        pattern: which weights share a mask: none, or blocks of output channels, which sparse kernels on CPUs gain from.
        operator: what the kept weights become: ``hard`` (published), ``soft`` or ``power`` (Feather, arXiv 2310.02448).
        power: options of ``operator: power``.
        min_density: smallest density of each layer.
        center: subtract layers' means after every step; None: as the control does by default, on fresh weights.
        gradient_scale: factor θ on the gradients that pruned weights receive.
        agreement_every: steps between checks that all ranks have the same thresholds and masks; 0: never.
    """

    enabled: bool = True
    control: Literal["loss", "track"] = "loss"
    loss: SparsityLoss = SparsityLoss()
    track: Track = Track()
    ramp: Ramp = Ramp(freeze_at=0.75)
    select: Select = Select()
    pattern: Pattern = Pattern()
    operator: Literal["hard", "soft", "power"] = "hard"
    power: Power = Power()
    min_density: float = 0.001
    center: bool | None = None
    gradient_scale: float = 1.0
    agreement_every: int = 100

    def __post_init__(self) -> None:
        for name in ("min_density", "gradient_scale"):
            check_fraction(f"pruning.{name}", getattr(self, name))
        check(self.agreement_every >= 0, f"pruning.agreement_every = {self.agreement_every} must not be negative")
        check(
            self.ramp.total_steps is None,
            f"pruning.ramp.total_steps = {self.ramp.total_steps}: it follows from the schedule; leave it out",
        )
        for choice, options in (
            ("control", {"loss": self.loss, "track": self.track}),
            ("operator", {"power": self.power}),
        ):
            chosen = getattr(self, choice)
            for name, value in options.items():
                if name != chosen and value != type(value)():
                    changed = next(f.name for f in dataclasses.fields(value) if getattr(value, f.name) != f.default)
                    check(
                        False,
                        f"pruning.{name}.{changed} = {getattr(value, changed)} is an option of {type(value).__name__}, but "
                        f"pruning.{choice} = {chosen}: set pruning.{choice} to {name}, or leave the option out",
                    )

    def build_control(self) -> Control:
        """The chosen control."""
        return self.loss if self.control == "loss" else self.track

    def build_operator(self) -> Operator:
        """The chosen operator."""
        return {"hard": Hard(), "soft": Soft(), "power": self.power}[self.operator]


@dataclass(frozen=True)
class ClusterConfig:
    """Where the workers run.

    Args:
        mode: ``ray`` (Ray Train), or ``local`` (this process, or the ranks that torchrun started).
        address: a running Ray cluster, ``auto``, or None: ``RAY_ADDRESS``, else a cluster on this machine.
        num_workers: number of workers; each is one rank.
        min_workers: with a value, the group is elastic between `min_workers` and `num_workers`.
        cpus_per_worker: CPUs reserved per worker; None: an equal share of this machine's on a local cluster, else 1.
        gpus_per_worker: GPUs reserved per worker; None: 1 where the cluster has some, else 0.
        max_failures: restarts of the worker group after a failure; -1: no limit.
        timeout_s: seconds after which a collective that does not finish ends the run.
    """

    mode: Literal["ray", "local"] = "ray"
    address: str | None = None
    num_workers: int = 2
    min_workers: int | None = None
    cpus_per_worker: float | None = None
    gpus_per_worker: int | None = None
    max_failures: int = 3
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        check(self.num_workers >= 1, f"cluster.num_workers = {self.num_workers} must be at least 1")
        check(
            self.min_workers is None or 1 <= self.min_workers <= self.num_workers,
            f"cluster.min_workers = {self.min_workers} must lie in 1..cluster.num_workers = {self.num_workers}",
        )
        check_positive("cluster.timeout_s", self.timeout_s)
        check_positive("cluster.cpus_per_worker", self.cpus_per_worker)


@dataclass(frozen=True)
class TrackingConfig:
    """Where the run's numbers go, besides ``metrics.jsonl``.

    Args:
        wandb: ``auto`` (online with a key and a network, else offline), ``online``, ``offline`` or ``disabled``.
        project: wandb project.
        entity: wandb user or team.
        group: wandb group.
        tags: wandb tags.
        also: further trackers that get the same rows: ``tensorboard`` (in the run's folder), ``mlflow`` (where
            ``MLFLOW_TRACKING_URI`` says, else in the run's folder).
        upload_model: store the finished network in wandb, besides its configuration and table of layers.
        timeout_s: seconds to wait for the wandb server before going offline.
        layers_every: optimizer steps between logged layer statistics; 0: at evaluations only.
        layer_accuracy_images: images per layer for the accuracy with that layer made dense; 0: off.
        layer_accuracy_every: epochs between those evaluations.
    """

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "asp-dist"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    also: tuple[Literal["tensorboard", "mlflow"], ...] = ()
    upload_model: bool = True
    timeout_s: float = 10.0
    layers_every: int = 0
    layer_accuracy_images: int = 0
    layer_accuracy_every: int = 5


@dataclass(frozen=True)
class OutputConfig:
    """Where the run's files go.

    Args:
        dir: folder of all runs; every worker must see it.
        checkpoint_epochs: epochs between checkpoints.
        checkpoint_steps: optimizer steps between checkpoints as well; None: none within an epoch.
        checkpoint_minutes: minutes between checkpoints as well; None: none within an epoch.
        keep: checkpoints to keep, besides the best.
        select: whose weights become ``model.safetensors``: those of the ``last`` step or their ``average``, as they were in the
            last validation or in the ``best`` one at the budget (``best``, ``best-average``); ``auto``: the better of the first
            two. All but ``last`` and ``average`` choose on the validation images, so that the accuracy on them is optimistic.
        storage: address of an object store, such as ``s3://bucket/runs``, for the checkpoints and copies of the
            results, so that a run can resume without its `dir`; None: everything stays in the run's folder.
    """

    dir: str = "runs"
    checkpoint_epochs: int = 1
    checkpoint_steps: int | None = None
    checkpoint_minutes: float | None = 10.0
    keep: int = 2
    select: Literal["auto", "last", "average", "best", "best-average"] = "auto"
    storage: str | None = None

    def __post_init__(self) -> None:
        for name in ("checkpoint_epochs", "checkpoint_steps", "checkpoint_minutes", "keep"):
            check_positive(f"output.{name}", getattr(self, name))
        check(
            self.storage is None or "://" in self.storage,
            f"output.storage = {self.storage!r} is not a URL: give one such as s3://bucket/runs, or use output.dir",
        )
        check_address("output.storage", self.storage)


@dataclass(frozen=True)
class ResumeConfig:
    """What happens when the run directory already contains a run.

    Args:
        enabled: resume from its latest checkpoint; False refuses to touch it.
        allow_changes: dotted names of fields that may differ from the run's own config.
        from_run: folder of another run, whose latest checkpoint a new run starts with: weights, optimizer and thresholds, at
            step 0 of the new run's schedule. For its weights alone, give its file as ``model.weights``.
    """

    enabled: bool = True
    allow_changes: tuple[str, ...] = ()
    from_run: str | None = None


@dataclass(frozen=True)
class Config:
    """A whole run.

    Args:
        name: name of the run, and of its folder under `output.dir`.
    """

    name: str = "run"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig = TrainingConfig()
    budget: BudgetConfig = BudgetConfig()
    pruning: PruningConfig = PruningConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()
    output: OutputConfig = OutputConfig()
    resume: ResumeConfig = ResumeConfig()

    def __post_init__(self) -> None:
        check(
            bool(self.name) and "/" not in self.name and self.name[0] not in ".-",
            f"name = {self.name!r} must be a plain folder name, which does not begin with a dot or a hyphen",
        )
        check(
            "average" not in self.output.select or self.training.ema_decay is not None,
            f"output.select = {self.output.select} needs an average of the weights: set training.ema_decay, such as 0.9998",
        )
