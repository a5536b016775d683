"""What the sweep benchmark runs: its settings, its grid, and the same request as a lorabench command line. Pure."""

from __future__ import annotations

from dataclasses import dataclass

ALPHA = 16
WARMUP = 0.06
CLIP = 1.0
EVAL_ROWS = 128  # rows of a validation batch, in every variant
RANKS = (4, 8, 16, 32)
PRUNED_RANKS = (8, 16, 32, 4)  # one cell is r = 8

VARIANTS = ("trainer_processes", "trainer_tuned", "peft_loop", "lorabench", "lorabench_fp32")
PRUNED = "lorabench_pruned"
RATIOS = {  # name -> (peer, lorabench): both sides of a ratio of makespans
    "trainer_processes": ("trainer_processes", "lorabench"),
    "trainer_tuned": ("trainer_tuned", "lorabench"),
    "peft_loop": ("peft_loop", "lorabench_fp32"),
    "trainer_processes_pruned": ("trainer_processes", PRUNED),
}


@dataclass(frozen=True)
class Model:
    """A base with its task. rate: the lower of two learning rates; metric: of the validation rows; gguf: converted once."""

    task: str
    max_length: int
    metric: str
    rate: float
    gguf: bool = False


MODELS = {
    "minilm": Model("tweets", 64, "accuracy", 1e-3),
    "smollm2": Model("chitchat", 128, "loss", 5e-4, gguf=True),
}


@dataclass(frozen=True)
class Settings:
    """The command line of the benchmark. dropout: of the base; None keeps the base's own."""

    runs: int = 8
    repeats: int = 3
    train_examples: int = 1600
    val_examples: int = 300
    batch_size: int = 16
    epochs: int = 1
    evaluations: int = 2
    dropout: float | None = 0.0
    device: str = "cpu"
    model: str = "minilm"
    variants: tuple[str, ...] = VARIANTS
    prune: bool = False
    seed: int = 0

    @property
    def steps(self) -> int:
        return -(-self.train_examples // self.batch_size) * self.epochs

    @property
    def eval_interval(self) -> int:
        """Steps between evaluations; the last one is at the last step."""
        return -(-self.steps // self.evaluations)

    @property
    def evaluated_at(self) -> list[int]:
        return [*range(self.eval_interval, self.steps, self.eval_interval), self.steps]


@dataclass(frozen=True)
class Grid:
    """Every rank with every rate, ranks outermost."""

    ranks: tuple[int, ...]
    rates: tuple[float, ...]

    @property
    def points(self) -> list[tuple[int, float]]:
        return [(r, lr) for r in self.ranks for lr in self.rates]


def rates(count: int, rate: float) -> tuple[float, ...]:
    """`count` rates a factor 2 apart, around `rate` and 2 * `rate`."""
    low = rate / 2 ** ((count - 1) // 2)
    return tuple(low * 2**i for i in range(count))


def grid(runs: int, model: str, *, prune: bool) -> Grid:
    """Two rates a rank up to eight runs, then more rates; with `prune` eight rates a rank. Raises ValueError."""
    rate = MODELS[model].rate
    if prune:
        if runs % 8 or not 8 <= runs <= 32:
            raise ValueError(f"--runs {runs}: with --prune 8, 16, 24 or 32 (eight rates a rank)")
        return Grid(PRUNED_RANKS[: runs // 8], rates(8, rate))
    if runs == 1:
        return Grid(RANKS[:1], rates(1, rate))
    if runs in (2, 4, 6, 8):
        return Grid(RANKS[: runs // 2], rates(2, rate))
    if runs > 8 and runs % 4 == 0:
        return Grid(RANKS, rates(runs // 4, rate))
    raise ValueError(f"--runs {runs}: 1, 2, 4, 6, 8 or a multiple of 4")


def base_overrides(s: Settings) -> list[str]:
    """What every lorabench run of the benchmark has in common, in Hydra's grammar.

    One test row, the fewest there can be: no variant reads test data. keep=last: no peer keeps its best weights.
    """
    model = MODELS[s.model]
    return [
        f"model={s.model}", f"model.dropout={'null' if s.dropout is None else s.dropout}",
        f"task={model.task}", f"task.max_length={model.max_length}", f"task.train_examples={s.train_examples}",
        f"task.val_examples={s.val_examples}", "task.test_examples=1",
        "method=lora", "method.target_modules=all-linear", f"method.alpha={ALPHA}", "method.dropout=0.0",
        "optimizer.weight_decay=0.0", "optimizer.schedule=linear", f"optimizer.warmup_ratio={WARMUP}",
        f"trainer.max_epochs={s.epochs}", f"trainer.batch_size={s.batch_size}", f"trainer.gradient_clip_val={CLIP}",
        f"trainer.eval_interval={s.eval_interval}", f"trainer.eval_batch_size={EVAL_ROWS}", "trainer.keep=last",
        f"trainer.accelerator={'gpu' if s.device == 'cuda' else 'cpu'}",
    ]  # fmt: skip


def sweep_overrides(s: Settings, variant: str) -> list[str]:
    """The arguments of `python -m lorabench` for one of its variants. One worker: the peers run one process at a time."""
    asked = grid(s.runs, s.model, prune=s.prune)
    own = {"lorabench": [], "lorabench_fp32": ["trainer.precision=32"], PRUNED: ["sweep.prune=true"]}[variant]
    axes = {"method.r": asked.ranks, "optimizer.lr": asked.rates}
    return [
        "-m", *base_overrides(s), *(f"{key}={','.join(map(repr, values))}" for key, values in axes.items()),
        f"sweep.tune_seeds=[{s.seed}]", "sweep.measure_solo=false", "sweep.workers=1", "sweep.name=benchmark", "sweep.dir=sweep",
        "report.dir=report", *own,
    ]  # fmt: skip
