"""The whole configuration of a run: sections that belong to no component, and the roots.

`RunConfig` is what `mcore_rl.train` reads, `SftRunConfig` what `mcore_rl.sft` reads. Sections of a
component stand in the component's file. After composition nothing writes to these objects.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

from mcore_rl.algorithms.advantages.base import ADVANTAGES, AlgorithmConfig
from mcore_rl.algorithms.aggregate import AGG_MODES
from mcore_rl.algorithms.objective import ObjectiveConfig
from mcore_rl.config.environment import ComposedConfig
from mcore_rl.data.packing import Cut, SequenceCount, TokenBudget
from mcore_rl.data.prompts import DataConfig
from mcore_rl.errors import refuse_unread, require, require_one_of
from mcore_rl.megatron.config import (
    ALL_LINEAR,
    CriticOptimConfig,
    LoraConfig,
    MegatronConfig,
    OffloadConfig,
    OptimConfig,
    RefMegatronConfig,
    RouterReplayConfig,
)
from mcore_rl.model_files import fetch_model, find_model
from mcore_rl.rewards.base import CustomRewardConfig, RewardConfig
from mcore_rl.rollout.base import RolloutConfig
from mcore_rl.types import Layout, Offloads, Part

MAX_PROCESSES_PER_NODE = 128
"""More than any machine has devices; beyond it a typing error would flood the machine."""


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """`model`: the checkpoint that training starts from."""

    path: str | None = None
    """Hugging Face folder with config, tokenizer and safetensors, or a model of the hub:
    organisation/name, or organisation/name@revision. The latter comes from the hub's cache on this
    machine and is downloaded only with HF_HUB_OFFLINE=0."""
    lora_rank: int = 0
    """Rank of the adapters of LoRA, which then train instead of the weights; 0: no adapters."""
    lora_alpha: int = 16
    """What an adapter adds is scaled by lora_alpha / lora_rank."""
    target_modules: Any = "all-linear"
    """Layers with adapters: all-linear (of attention, MLPs and experts), or a list of the last
    parts of Hugging Face's names, such as [q_proj,k_proj,v_proj]."""

    def __post_init__(self) -> None:
        rank, alpha = self.lora_rank, self.lora_alpha
        modules = cast("str | list[Any]", self.target_modules)  # which is not checked yet
        require(rank >= 0, "model.lora_rank", rank, "must be >= 0")
        require(alpha > 0, "model.lora_alpha", alpha, "must be > 0")
        names = modules if isinstance(modules, list) else []
        is_list = bool(names) and all(isinstance(name, str) for name in names)
        require(
            modules == ALL_LINEAR or is_list,
            "model.target_modules",
            modules,
            "is neither all-linear nor a list of names",
            "Give names as [q_proj,k_proj,v_proj].",
        )
        unused = "has no effect without adapters"
        fix = "Set model.lora_rank, or leave it out."
        require(rank > 0 or alpha == 16, "model.lora_alpha", alpha, unused, fix)
        require(rank > 0 or modules == ALL_LINEAR, "model.target_modules", modules, unused, fix)

    @property
    def folder(self) -> str:
        """Where the model's files are on this machine."""
        return str(find_model(str(self.path), weights=False))

    @property
    def lora(self) -> LoraConfig | None:
        """The adapters; None where all weights train."""
        if self.lora_rank == 0:
            return None
        modules = self.target_modules
        names = (modules,) if modules == ALL_LINEAR else tuple(modules)
        return LoraConfig(rank=self.lora_rank, alpha=self.lora_alpha, target_modules=names)


@dataclass(kw_only=True)
class MinibatchConfig:
    """What every trained model has: how a minibatch is cut, and clipping."""

    SECTION: ClassVar[str] = "actor"

    ppo_micro_batch_size_per_gpu: int | None = None
    """Sequences per micro-batch; None: cut by tokens."""
    use_dynamic_bsz: bool | None = None
    """Cut micro-batches by tokens; None: unless ppo_micro_batch_size_per_gpu is set."""
    ppo_max_token_len_per_gpu: int = 16384
    """Tokens per micro-batch and device when cut by tokens; a micro-batch is spread over the
    context-parallel ranks, so it holds context_parallel_size times as many."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""

    def __post_init__(self) -> None:
        section, size = self.SECTION, self.ppo_micro_batch_size_per_gpu
        require(
            size is None or size >= 1,
            f"{section}.ppo_micro_batch_size_per_gpu",
            size,
            "must be at least 1",
        )
        require(
            not (self.use_dynamic_bsz and size is not None),
            f"{section}.ppo_micro_batch_size_per_gpu",
            size,
            f"has no effect with {section}.use_dynamic_bsz=true",
            "Leave one of them out.",
        )
        require(
            self.use_dynamic_bsz is not False or size is not None,
            f"{section}.use_dynamic_bsz",
            self.use_dynamic_bsz,
            f"needs {section}.ppo_micro_batch_size_per_gpu",
            f"Set it, or leave out {section}.use_dynamic_bsz.",
        )
        require(
            self.ppo_max_token_len_per_gpu >= 1,
            f"{section}.ppo_max_token_len_per_gpu",
            self.ppo_max_token_len_per_gpu,
            "must be at least 1",
        )
        require(self.grad_clip >= 0, f"{section}.grad_clip", self.grad_clip, "must be >= 0")

    def cut_over(self, context_parallel_size: int) -> Cut:
        """How a minibatch is cut into micro-batches."""
        if self.ppo_micro_batch_size_per_gpu is not None:
            return SequenceCount(num_sequences=self.ppo_micro_batch_size_per_gpu)
        cp = context_parallel_size
        key = f"{self.SECTION}.ppo_max_token_len_per_gpu"
        key += " * context_parallel_size" if cp > 1 else ""
        return TokenBudget(max_tokens=self.ppo_max_token_len_per_gpu * cp, key=key)


@dataclass(kw_only=True)
class TrainingConfig(MinibatchConfig):
    """What actors of every kind of training share."""

    optim: OptimConfig = field(default_factory=OptimConfig)
    megatron: MegatronConfig = field(default_factory=MegatronConfig)

    @property
    def cut(self) -> Cut:
        """How a minibatch is cut into micro-batches."""
        return self.cut_over(self.megatron.context_parallel_size)


@dataclass(kw_only=True)
class ActorConfig(TrainingConfig, ObjectiveConfig):
    """`actor`: the policy that is trained, its loss and how a step is divided into updates."""

    ppo_mini_batch_size: int = 256
    """Prompts per optimizer update; must divide data.train_batch_size."""
    ppo_epochs: int = 1
    """Passes over the samples of a step."""
    calculate_entropy: bool = True
    """Log the entropy also where no bonus needs it."""
    router_replay: RouterReplayConfig = field(default_factory=RouterReplayConfig)

    def __post_init__(self) -> None:
        TrainingConfig.__post_init__(self)
        ObjectiveConfig.__post_init__(self)
        for name in ("ppo_mini_batch_size", "ppo_epochs"):
            value = getattr(self, name)
            require(value >= 1, f"actor.{name}", value, "must be at least 1")


@dataclass(kw_only=True, slots=True)
class RefConfig:
    """`ref`: the frozen copy of the first model, where a KL against it is computed."""

    megatron: RefMegatronConfig = field(default_factory=RefMegatronConfig)


@dataclass(kw_only=True, slots=True)
class CriticModelConfig:
    """`critic.model`: the checkpoint that the critic starts from; all of it trains."""

    path: str | None = None
    """As model.path; its `score.weight` is the head if it has one, a new head begins at 0. None:
    model.path."""

    @property
    def folder(self) -> str | None:
        """Where the model's files are on this machine; None: where those of model.path are."""
        return self.path and str(find_model(self.path, "critic.model.path", weights=False))


@dataclass(kw_only=True)
class CriticConfig(MinibatchConfig):
    """`critic`: the model whose values `algorithm.adv_estimator=gae` reads; otherwise there is none
    and nothing here is read. It has the layout, type and Megatron options of `actor.megatron`, but
    for what is offloaded."""

    SECTION: ClassVar[str] = "critic"

    model: CriticModelConfig = field(default_factory=CriticModelConfig)
    optim: CriticOptimConfig = field(default_factory=CriticOptimConfig)
    megatron: OffloadConfig = field(default_factory=OffloadConfig)
    ppo_mini_batch_size: int | None = None
    """Prompts per optimizer update; None: the actor's."""
    ppo_epochs: int | None = None
    """Passes over the samples of a step; None: the actor's."""
    cliprange_value: float = 0.5
    """How far a value may move from the old one before it is held back."""
    loss_agg_mode: str = "token-mean"
    """How the losses of tokens add up, as `actor.loss_agg_mode`."""

    def __post_init__(self) -> None:
        MinibatchConfig.__post_init__(self)
        require_one_of("critic.loss_agg_mode", self.loss_agg_mode, AGG_MODES)
        clip = self.cliprange_value
        require(clip > 0, "critic.cliprange_value", clip, "must be > 0")
        for name in ("ppo_mini_batch_size", "ppo_epochs"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"critic.{name}", value, "must be at least 1")


@dataclass(kw_only=True, slots=True)
class TrainerConfig:
    """`trainer`: length of the run, what is logged, saved and resumed."""

    total_epochs: int = 1
    """Passes over data.train_files; total_training_steps, when set, decides instead. With
    data.gen_batch_size a step counts as the prompts that it draws at least, whatever it trains on;
    steps that must draw more make the passes more."""
    total_training_steps: int | None = None
    """Steps of the run; None: as many as total_epochs take."""
    n_gpus_per_node: int = 1
    """Train processes per node, one per device; on CPU, processes."""
    nnodes: int = 1
    """Nodes of the trainer."""
    launcher: str = "auto"
    """What starts the processes: local (this command, on this machine), torchrun (which starts this
    command), ray (joins the cluster at RAY_ADDRESS, or starts one of this machine); auto: torchrun
    where it has started this command, otherwise local."""
    loop: str = "on_policy"
    """When generation happens: on_policy (a step generates, then trains) or overlapped (engines of
    their own generate for the coming steps while a step trains)."""
    max_staleness: int = 0
    """With loop overlapped: steps that the weights which draw a token may be older than those which
    train on it; 0: nothing overlaps, and the numbers are those of on_policy."""
    project_name: str = "mcore_rl"
    """For trackers and the name of the run folder, as the next."""
    experiment_name: str = "default"
    """Of the run."""
    default_local_dir: str = "outputs/${trainer.project_name}/${trainer.experiment_name}"
    """The run folder: config, metrics, samples, checkpoints, report."""
    logger: list[str] = field(default_factory=lambda: ["console", "tensorboard"])
    """Trackers: console, tensorboard, wandb, mlflow, swanlab, trackio; metrics.jsonl is always
    written."""
    critic_warmup: int = 0
    """Steps in which the critic alone trains; read with a critic."""
    val_before_train: bool = True
    """Validate before the first step."""
    val_only: bool = False
    """Validate once, with model.path or the checkpoint that the run would go on from, log that in
    validation/global_step_<n> of the run folder, and stop."""
    test_freq: int = -1
    """Validate every so many steps, and after the last; -1: only after the last."""
    save_freq: int = -1
    """Save a checkpoint every so many steps, and after the last; -1: only after the last."""
    async_save: bool = False
    """Write checkpoints while training goes on, from copies in host memory; a crash meanwhile
    leaves the previous one in force."""
    max_ckpt_to_keep: int | None = None
    """Delete older checkpoints than the last so many; None keeps all."""
    best_ckpt_metric: str | None = None
    """Keep the checkpoint with the best value of this metric too, of those that have one:
    eval/<data source>/accuracy, for example."""
    best_ckpt_mode: str = "max"
    """Whether the largest ("max") or the smallest ("min") value is the best."""
    resume_mode: str = "auto"
    """auto: go on from the last checkpoint in the run folder if there is one; resume_path: go on
    from resume_from_path; disable: start anew and refuse a run folder that holds a run."""
    resume_from_path: str | None = None
    """Folder global_step_<n>. One of this run: later ones are done again. One of another run: where
    this run begins; once it has checkpoints of its own, it goes on from the last of them."""
    hang_timeout_s: float = 3600.0
    """End the run when nothing goes on in any worker for so long, with the stacks of all of them.
    The longest that one piece of work may take: a micro-batch, a step of an engine, the writing of
    a checkpoint."""
    journal: bool = True
    """Keep what the engines answered and the rewards said in journal/ of the run folder, about 8
    bytes a token: what `mcore-rl replay` trains again from, without an engine."""
    export_hf_model: bool = True
    """Write the trained weights as a Hugging Face folder after the last step."""
    log_val_generations: int = 8
    """Samples written per step and per validation."""
    dry_run: bool = False
    """Print placement, packing of a step and memory per device, and stop. Starts no process and
    reads no weights: model.path needs config.json alone."""
    device_memory_gib: float = 80.0
    """dry_run: what a device has."""

    def __post_init__(self) -> None:
        modes = ("auto", "disable", "resume_path")
        require_one_of("trainer.resume_mode", self.resume_mode, modes)
        require_one_of("trainer.best_ckpt_mode", self.best_ckpt_mode, ("max", "min"))
        require_one_of("trainer.loop", self.loop, ("on_policy", "overlapped"))
        age = self.max_staleness
        require(age >= 0, "trainer.max_staleness", age, "must be at least 0")
        if self.loop == "on_policy":
            refuse_unread(self, "trainer", ["max_staleness"], "loop=on_policy")
        require_one_of("trainer.launcher", self.launcher, ("auto", "local", "torchrun", "ray"))
        require(
            (self.resume_mode == "resume_path") == (self.resume_from_path is not None),
            "trainer.resume_from_path",
            self.resume_from_path,
            f"does not fit trainer.resume_mode={self.resume_mode}",
            "Set both, resume_path and the folder of a checkpoint, or neither.",
        )
        memory = self.device_memory_gib
        require(memory > 0, "trainer.device_memory_gib", memory, "must be > 0")
        require(
            self.dry_run or memory == 80.0,
            "trainer.device_memory_gib",
            memory,
            "is not read without trainer.dry_run=true",
            "Remove it.",
        )
        for name in ("total_epochs", "n_gpus_per_node", "nnodes"):
            require(
                getattr(self, name) >= 1,
                f"trainer.{name}",
                getattr(self, name),
                "must be at least 1",
            )
        folder = self.default_local_dir
        require(bool(folder), "trainer.default_local_dir", folder, "is not set", "Name a folder.")
        most = MAX_PROCESSES_PER_NODE
        fits = self.n_gpus_per_node <= most
        require(fits, "trainer.n_gpus_per_node", self.n_gpus_per_node, f"is more than {most}")
        steps = self.total_training_steps
        require(
            steps is None or steps >= 1, "trainer.total_training_steps", steps, "must be at least 1"
        )
        warmup = self.critic_warmup
        require(warmup >= 0, "trainer.critic_warmup", warmup, "must be at least 0")
        for name in ("test_freq", "save_freq"):
            value = getattr(self, name)
            require(value == -1 or value >= 1, f"trainer.{name}", value, "must be -1 or at least 1")
        shown = self.log_val_generations
        require(shown >= 0, "trainer.log_val_generations", shown, "must be >= 0")
        keep = self.max_ckpt_to_keep
        require(keep is None or keep >= 1, "trainer.max_ckpt_to_keep", keep, "must be at least 1")
        require(
            self.best_ckpt_metric is None or keep is not None,
            "trainer.best_ckpt_metric",
            self.best_ckpt_metric,
            "has no effect: every checkpoint is kept",
            "Set trainer.max_ckpt_to_keep too.",
        )
        require(
            self.best_ckpt_mode == "max" or self.best_ckpt_metric is not None,
            "trainer.best_ckpt_mode",
            self.best_ckpt_mode,
            "has no effect without trainer.best_ckpt_metric",
            "Set that too, or leave it out.",
        )

    @property
    def world_size(self) -> int:
        return self.n_gpus_per_node * self.nnodes


@dataclass(kw_only=True, slots=True)
class RunConfig(ComposedConfig):
    """Everything that `mcore_rl.train` is told."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    ref: RefConfig = field(default_factory=RefConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    custom_reward_function: CustomRewardConfig = field(default_factory=CustomRewardConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    @property
    def has_critic(self) -> bool:
        return ADVANTAGES.get(self.algorithm.adv_estimator).needs_critic

    @property
    def needs_reference(self) -> bool:
        """Whether the KL against the initial policy is computed anywhere."""
        return self.actor.use_kl_loss or self.algorithm.use_kl_in_reward

    @property
    def keeps_reference(self) -> bool:
        """Whether a frozen copy of the initial weights is kept for it: under adapters the weights
        themselves are that."""
        return self.needs_reference and self.model.lora is None

    @property
    def offloads(self) -> Offloads:
        """What is in host memory while it is not needed, of the models that there are."""
        reference = {Part.REFERENCE} if self.ref.megatron.param_offload else set[Part]()
        return Offloads(
            actor=self.actor.megatron.parts | (reference if self.keeps_reference else set[Part]()),
            critic=self.critic.megatron.parts,
            reference=Part.REFERENCE if self.keeps_reference else Part.PARAM,
        )


@dataclass(kw_only=True, slots=True)
class SftRunConfig(ComposedConfig):
    """Everything that `mcore_rl.sft` is told; data.train_batch_size counts sequences."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    actor: TrainingConfig = field(default_factory=TrainingConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    @property
    def offloads(self) -> Offloads:
        """What is in host memory while it is not needed."""
        return Offloads(actor=self.actor.megatron.parts)


def with_fetched_models(cfg: RunConfig | SftRunConfig) -> Any:
    """Return the configuration with every model of the hub named by its commit, all of it in the
    cache, so that a run goes on with the files that it began with. A plan needs no weights.

    Raises:
        UserError: if a model of the hub is not in the cache and must not or cannot be downloaded.
    """
    weights = not cfg.trainer.dry_run
    path = fetch_model(str(cfg.model.path), "model.path", weights=weights)
    cfg = replace(cfg, model=replace(cfg.model, path=path))
    if isinstance(cfg, RunConfig) and cfg.critic.model.path is not None:
        path = fetch_model(cfg.critic.model.path, "critic.model.path", weights=weights)
        cfg = replace(cfg, critic=replace(cfg.critic, model=CriticModelConfig(path=path)))
    return cfg


def train_layout(megatron: MegatronConfig, world_size: int) -> Layout:
    """Return the layout of `world_size` train workers.

    Raises:
        UserError: if the parallel sizes do not divide the number of workers.
    """
    tp, pp = megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size
    cp, ep = megatron.context_parallel_size, megatron.expert_model_parallel_size
    etp = megatron.expert_tensor_parallel_size or tp
    key = "trainer.n_gpus_per_node * trainer.nnodes"
    require(
        world_size % (tp * pp * cp) == 0,
        key,
        world_size,
        f"is not a multiple of tensor {tp} x pipeline {pp} x context {cp} parallel size",
    )
    require(
        world_size % (etp * ep * pp) == 0,
        key,
        world_size,
        f"is not a multiple of expert {ep} x expert tensor {etp} x pipeline {pp} parallel size",
    )
    return Layout(
        tp=tp,
        pp=pp,
        vpp=megatron.virtual_pipeline_model_parallel_size or 1,
        cp=cp,
        ep=ep,
        etp=etp,
        dp=world_size // (tp * pp * cp),
    )
