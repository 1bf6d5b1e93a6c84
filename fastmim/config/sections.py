"""The sections of the config: every key, its type, its default and what it means."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ModelWrapValidatorHandler, model_validator

from fastmim.config import checks
from fastmim.config.fields import (
    AboveZero,
    AutoOrBool,
    BelowOne,
    Betas,
    Channels,
    Count,
    Counts,
    Fraction,
    Fused,
    Interval,
    IntOrInts,
    Loggers,
    NoData,
    Path,
    PathOrPaths,
    Positions,
    Positive,
    Positives,
    Probability,
    Range,
    Rate,
    Section,
    Seed,
    Size,
    Spreads,
    Tree,
    UnitRange,
    Weights,
)
from fastmim.config.objective import DEFAULT, AnyObjective, objective_section


class ModelSection(Section):
    """The encoder. Everything left null comes from the size, or from the encoder's own default."""

    name: str = Field("swinv2_base", description="family (swin, swinv2, vit, dvae, dalle) or size (swinv2_base, ...)")
    img_size: Size | None = Field(None, description="pixels of the training crop, one number or [height, width]")
    patch_size: Positive | None = Field(None, description="edge of a patch in pixels")
    in_chans: Positive = Field(3, description="image channels: 1 grey, 3 RGB, 4 RGBA; any with data.pixels=float32")
    embed_dim: Positive | None = Field(None, description="channels (of the first stage)")
    depths: Positives | None = Field(None, description="swin: blocks per stage")
    num_heads: IntOrInts | None = Field(None, description="attention heads; swin: one number per stage")
    window_size: IntOrInts | None = Field(None, description="swin: attention window in tokens")
    mlp_ratio: AboveZero | None = Field(None, description="hidden channels of the MLP over its input channels")
    qkv_bias: bool | None = Field(None, description="bias on query, key and value (swinv2, vit: query and value)")
    key_bias: bool | None = Field(None, description="vit: keys have a bias too (timm's vit, DINO, iBOT)")
    drop_path_rate: BelowOne | None = Field(None, description="stochastic depth of the last block")
    norm_eps: AboveZero | None = Field(None, description="swin, swinv2: of every LayerNorm (iBOT: 1e-6)")
    pretrained_window_size: IntOrInts | None = Field(None, description="swinv2: window the weights were trained with")
    extra_norm_period: Count | None = Field(None, description="swinv2 H and G: a norm after every n-th block, 0 = none")
    extra_norm_scope: Literal["stage", "global"] | None = Field(None, description="how those blocks are counted")
    policy: Literal["default", "parity"] | None = Field(
        None, description="swin: parity shifts a map before it pads it, as timm does; null = as optim.policy"
    )
    depth: Positive | None = Field(None, description="vit: blocks; dvae: residual blocks on either side")
    init_values: Rate | None = Field(None, description="vit: start of LayerScale, 0 = none")
    shared_rel_pos_bias: bool | None = Field(None, description="vit: one relative position bias for all blocks")
    rel_pos_bias: bool | None = Field(None, description="vit: a relative position bias in every block")
    abs_pos_embed: Positions | None = Field(
        None, description="vit: absolute positions; true = learned, sincos = fixed (MAE), sincos_moco = MoCo v3's order"
    )
    init: Literal["simmim", "timm", "mae", "moco"] | None = Field(
        None, description="vit: first weights; timm = as DINO and iBOT"
    )
    codes: Positive | None = Field(None, description="dvae, dalle: size of the vocabulary")
    code_dim: Positive | None = Field(None, description="dvae, dalle: dimensions of a code")
    init_from: Path | None = Field(
        None, description="weights to start from: .safetensors or .pth, timm's names or ours"
    )

    def encoder_kwargs(self) -> dict[str, Any]:
        """The dict for ``create_objective(encoder=...)``: every architecture key that is not null."""
        values = {name: getattr(self, name) for name in type(self).model_fields if name != "init_from"}
        return {name: value for name, value in values.items() if value is not None}

    @model_validator(mode="after")
    def _check(self) -> ModelSection:
        checks.architecture(self.encoder_kwargs())
        return self


class DataSection(Section):
    """Where the images are and how they are read and augmented."""

    path: PathOrPaths | None = Field(
        None,
        description="folder of images, nested or flat, or tar shards: a folder of them, a.tar, a-{000..127}.tar; "
        "or a list of these",
    )
    weights: Weights | None = Field(
        None, description="path=[a, b]: share of the samples from each, such as [3, 1]; null = by number of images"
    )
    val_path: PathOrPaths | None = Field(None, description="held-out folder for the validation reconstruction loss")
    val_fraction: Fraction | None = Field(
        None, description="instead of val_path: share of path's images held out, by a hash of each name; null = none"
    )
    labelled_path: Path | None = Field(
        None,
        description="labelled images whose k-NN accuracy is watched: class folders, shards with .cls, or train and val"
        " of these",
    )
    labels: Path | None = Field(
        None, description="CSV of file,class for labelled_path, in fine-tuning for path; multi_label: file,class;class"
    )
    val_labels: Path | None = Field(None, description="the same for val_path, in fine-tuning")
    file_list: Path | None = Field(None, description="text file, one image per line, relative to path (or to the list)")
    follow_links: bool = Field(False, description="follow linked folders, each once, and links that lead out of path")
    component: str | None = Field(
        None, description="shards: extension of the member of a sample that is the image: rgb.png, jpg;png; * = each"
    )
    loader: Literal["auto", "dali", "torchvision", "pil", "synthetic"] = Field(
        "auto", description="auto = dali on a GPU if installed, else torchvision; synthetic = noise, reads nothing"
    )
    num_workers: Count = Field(2, description="reader processes per rank; at 0 a crash of a decoder ends the run")
    scale: UnitRange = Field((0.67, 1.0), description="crop area as a share of the image, [low, high]")
    ratio: Range = Field((3 / 4, 4 / 3), description="crop aspect ratio, [low, high]")
    hflip: Probability = Field(0.5, description="probability of a horizontal flip")
    interpolation: Literal["bilinear", "bicubic"] = Field("bilinear", description="resampling of the crop")
    mean: Channels = Field(
        (0.485, 0.456, 0.406),
        description="per channel, of values in [0, 1], or of samples as stored with pixels=float32; one value fits all",
    )
    std: Spreads = Field((0.229, 0.224, 0.225), description="in the unit of mean; `fastmim data stats` measures both")
    value_range: Interval | None = Field(
        None,
        description="sample values that become 0 and 255, others are clipped; null = all that the type holds "
        "(of 16 bits the high byte), [0, 4095] for 12 bits in 16",
    )
    alpha: str = Field(
        "white",
        description='1 or 3 channels: what is laid under transparent pixels: white, black or "#rrggbb"; drop = ignore '
        "alpha",
    )
    pixels: Literal["uint8", "float32"] = Field(
        "uint8", description="float32: samples as stored, any number of channels, normalised by mean and std"
    )
    no_data: NoData | None = Field(
        None, description="pixels=float32: samples of this value (a number or nan) are no data; null = none are"
    )
    rot90: bool = Field(False, description="turn square crops by 0 to 3 quarter turns (aerial images have no up)")
    exif_orientation: bool = Field(
        False, description="turn images as their EXIF or TIFF orientation says; false = pixels as they are stored"
    )
    array: str | None = Field(None, description="pixels=float32: the array of an .npz; null = the only one")
    channel_order: Literal["auto", "first", "last"] = Field(
        "auto", description="pixels=float32: axis of the channels in arrays; auto = the one as long as model.in_chans"
    )
    max_bad_fraction: Probability = Field(0.5, description="stop when more than this share of files is unreadable")
    verify: Literal["auto", "full", "none"] = Field("auto", description="decode every file before training starts")
    min_size: Positive = Field(8, description="drop images with an edge shorter than this, in pixels")

    @model_validator(mode="after")
    def _check(self) -> DataSection:
        checks.weights(self.path, self.weights)
        checks.held_out(self.val_path, self.val_fraction)
        checks.reading(self)
        return self


class OptimSection(Section):
    """The optimiser and its learning-rate schedule."""

    name: Literal["adamw", "lamb"] = Field("adamw", description="optimiser; lamb: for huge batches, not with ZeRO")
    lr: Rate = Field(1e-4, description="peak learning rate, per lr_batch images")
    warmup_lr: Rate = Field(5e-7, description="learning rate of the first step, scaled like lr")
    min_lr: Rate = Field(0.0, description="learning rate at the end of a cosine, scaled like lr unless scale_min_lr")
    scale_min_lr: bool = Field(True, description="min_lr is scaled like lr (DINO, iBOT: false)")
    lr_batch: Count | None = Field(512, description="rates are scaled by global batch / lr_batch; 0 or null: absolute")
    weight_decay: Rate = Field(0.05, description="decoupled weight decay")
    weight_decay_end: Rate | None = Field(None, description="weight decay at the end of a cosine, null = constant")
    betas: Betas = Field((0.9, 0.999), description="decay rates of Adam's averages")
    eps: AboveZero = Field(1e-8, description="Adam's epsilon")
    clip_grad: AboveZero | None = Field(5.0, description="largest gradient norm, null = no clipping")
    clip_each: bool = Field(False, description="clip_grad is of each tensor (DINO, iBOT), else of all gradients")
    schedule: Literal["cosine", "step", "multistep", "constant"] = Field("cosine", description="after the warm-up")
    warmup_epochs: Rate | None = Field(0.0, description="linear warm-up in epochs")
    warmup_steps: Count | None = Field(None, description="linear warm-up in steps, instead of warmup_epochs")
    milestones: Counts = Field((), description="multistep: epochs at which the rate is multiplied by gamma")
    milestone_steps: Counts = Field((), description="multistep: the same in steps, instead of milestones")
    decay_epochs: AboveZero | None = Field(None, description="step: epochs between multiplications by gamma")
    decay_steps: Positive | None = Field(None, description="step: the same in steps, instead of decay_epochs")
    gamma: AboveZero = Field(0.1, description="step, multistep: factor")
    warmup_inclusive: bool = Field(False, description="the last warm-up step has the full rate (DINO, iBOT, BEiT)")
    cosine_after_warmup: bool = Field(True, description="cosine over the steps after warm-up (false: over all steps)")
    policy: Literal["default", "parity"] = Field(
        "default", description="which parameters decay; parity = the reference"
    )
    schedule_lag: bool | None = Field(None, description="use the rate of the step before; null = with policy parity")

    @model_validator(mode="before")
    @classmethod
    def _steps_or_epochs(cls, value: Any) -> Any:
        return checks.either(value, "warmup_steps", "warmup_epochs", default=0.0)

    @model_validator(mode="after")
    def _check(self) -> OptimSection:
        checks.schedule(self.schedule, self.model_dump())
        return self


class TrainSection(Section):
    """How long, in which batches, and what is written on the way."""

    steps: Positive | None = Field(None, description="length in optimiser steps, instead of epochs")
    epochs: Positive | None = Field(100, description="length in passes over the data")
    micro_batch_size: Positive = Field(64, description="images per rank in one forward and backward")
    grad_accum_steps: Positive = Field(1, description="micro-batches per optimiser step")
    global_batch_size: Positive | None = Field(
        None,
        description="images per optimiser step over all ranks; null = micro x accum x ranks",
    )
    seed: Seed = Field(0, description="of weights, masks, crops and order")
    log_every: Positive = Field(10, description="steps between lines of metrics (one host synchronisation each)")
    log_seconds: Rate | None = Field(30.0, description="also a line after so many seconds, null or 0 = by steps alone")
    save_every: Count = Field(0, description="steps between checkpoints, 0 = at the end only")
    keep: Positive = Field(2, description="checkpoints kept, the newest")
    val_every: Count = Field(0, description="steps between validations, 0 = at the end only")
    val_batches: Positive | None = Field(None, description="micro-batches per validation, null = all held-out images")
    probe_every: Count = Field(0, description="steps between k-NN and RankMe of labelled_path, 0 = at the end only")
    probe_images: Positive | None = Field(10_000, description="of labelled_path, evenly spread; null = all")
    picture_every: Count = Field(0, description="steps between reconstruction pictures, 0 = at the end only")
    resume: Path = Field(
        "auto", description="auto: newest checkpoint in output.dir; last_whole: newest undamaged one; none; or a path"
    )
    resume_changes: Literal["refuse", "allow"] = Field(
        "refuse", description="allow: rates, clip_grad and schedule may differ from the checkpoint's, and are noted"
    )
    branch_from: Path | None = Field(
        None, description="another run, or a checkpoint of it, to go on from in a new output.dir, with other rates"
    )

    @model_validator(mode="before")
    @classmethod
    def _steps_or_epochs(cls, value: Any) -> Any:
        return checks.either(value, "steps", "epochs")

    @model_validator(mode="after")
    def _check(self) -> TrainSection:
        checks.length(self.steps, self.epochs)
        checks.batch(self.global_batch_size, self.micro_batch_size)
        return self


class EfficiencySection(Section):
    """Speed and memory. Nothing here changes the loss, except precision and residual_dtype, by their rounding."""

    kernels: Literal["auto", "triton", "torch", "reference"] = Field("auto", description="implementation of every op")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto = bf16 on a GPU that has it, else fp32; fp16 (loss scaling) with zero_stage 1 to 3"
    )
    residual_dtype: Literal["auto", "fp32"] = Field(
        "auto", description="residual stream; auto = as the products (float16 excepted), fp32 = as the references"
    )
    compile: bool = Field(False, description="torch.compile the objective")
    cuda_graph: AutoOrBool = Field(
        "auto", description="one GPU: the whole step as one launch; auto = where benchmarks/gpu_proof.py has proved it"
    )
    fused_optimizer: Fused = Field(
        "auto", description="one kernel for the optimiser step; apex: NVIDIA's; cpu_adam: DeepSpeed's, for offload"
    )
    threads: Positive | None = Field(None, description="CPU threads of torch, null = torch's choice")
    recompute: Literal["none", "fc1", "fc1_qkv", "gemm", "full"] = Field(
        "none", description="what backward computes again: fc1, fc1 and qkv, all but matrix products, whole blocks"
    )
    recompute_every: Positive = Field(1, description="apply recompute to every n-th block")
    recompute_offload: bool = Field(False, description="keep what the recomputed blocks save in the CPU's memory")
    zero_stage: Literal[0, 1, 2, 3] | None = Field(
        None, description="DeepSpeed ZeRO: 1 cuts optimiser states, 2 also gradients, 3 also weights; null = plain DDP"
    )
    offload_optimizer: Literal["none", "cpu", "nvme"] = Field("none", description="where optimiser states live")
    offload_param: Literal["none", "cpu", "nvme"] = Field("none", description="zero_stage 3: where weights live")
    nvme_path: Path | None = Field(None, description="folder on a local drive for offload to nvme")
    deepspeed: Tree = Field({}, description="further keys for DeepSpeed's own configuration")

    @model_validator(mode="after")
    def _check(self) -> EfficiencySection:
        checks.zero(self.zero_stage, self.precision, self.compile, self.deepspeed)
        checks.offload(self.zero_stage, self.offload_optimizer, self.offload_param, self.nvme_path)
        checks.recompute(self.recompute, self.recompute_every, self.recompute_offload)
        return self


class OutputSection(Section):
    """What a run leaves behind."""

    dir: Path = Field("runs/default", description="folder of the run: config, metrics, checkpoints, pictures, encoder")
    loggers: Loggers = Field(
        ("tensorboard",),
        description="where numbers and pictures go beside metrics.jsonl: tensorboard, csv, wandb, mlflow; [] = nowhere",
    )
    pictures: Count = Field(4, description="images in a reconstruction picture, 0 = no pictures")
    bands: Positives | None = Field(
        None, description="channels that pictures show, one or three, from 1 on; null: the first three, all of up to 4"
    )


class Config(Section):
    """The whole configuration of a run, checked across its sections."""

    model: ModelSection = Field(default_factory=ModelSection, description="the encoder")
    objective: AnyObjective = Field(default_factory=lambda: objective_section(DEFAULT)(), description="the task")
    data: DataSection = Field(default_factory=DataSection, description="the images")
    optim: OptimSection = Field(default_factory=OptimSection, description="optimiser and learning rate")
    train: TrainSection = Field(default_factory=TrainSection, description="length, batches, logging")
    efficiency: EfficiencySection = Field(default_factory=EfficiencySection, description="speed and memory")
    output: OutputSection = Field(default_factory=OutputSection, description="what is written where")

    @model_validator(mode="before")
    @classmethod
    def _statistics(cls, value: Any) -> Any:
        return checks.default_statistics(value)

    @model_validator(mode="wrap")
    @classmethod
    def _check(cls, value: Any, handler: ModelWrapValidatorHandler[Config]) -> Config:
        cfg = handler(value)
        encoder = cfg.model.encoder_kwargs()
        checks.probe(cfg.train.probe_every, cfg.data)
        checks.labels(cfg.data, cfg.objective)
        checks.lamb(cfg.optim.name, cfg.efficiency.zero_stage)
        checks.objective(cfg.objective, encoder, cfg.data, value)
        checks.statistics(cfg.model.in_chans, cfg.data)
        checks.bands(cfg.output.bands, cfg.model.in_chans)
        return cfg
