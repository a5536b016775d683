"""What the JSON files of a sweep must look like before anything is read out of them: they may be torn, or another
program's.

The shapes are typed dictionaries that pydantic checks. Fields that are not named here are allowed. Pydantic is imported
with this module, so `records` imports it where a file is read.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from lorabench.store.identifiers import RUN_ID

SHAPE = ConfigDict(extra="allow", strict=True)


def _finite_number(value: Any) -> Any:
    """Raise for what is no number that a float can hold: text, true, infinity, or an integer that is too large."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("a finite number")
    try:
        if float(value) - float(value) != 0:
            raise ValueError("a finite number")
    except OverflowError as e:
        raise ValueError("a finite number") from e
    return value


def _scores(metrics: dict[str, Any]) -> dict[str, Any]:
    """Raise where a metric with a slash in its name, such as `val/loss`, is neither a number nor null, or another no
    scalar."""
    for name, value in metrics.items():
        scored = "/" in name and name != "probe/name"
        if value is not None and (scored or not isinstance(value, (str, bool))):
            try:
                _finite_number(value)
            except ValueError as e:
                allowed = "a finite number or null" if scored else "a number, a text, true, false or null"
                raise ValueError(f"{name}: {allowed}") from e
    return metrics


def _mapping(value: Any) -> Any:
    """Raise for anything but a mapping; what is inside is not looked at."""
    if not isinstance(value, dict):
        raise ValueError("a mapping")
    return value


def _run_id(value: Any) -> Any:
    """Raise for what is no run_id."""
    if not isinstance(value, str) or RUN_ID.fullmatch(value) is None:
        raise ValueError("12 hex digits")
    return value


Number = Annotated[Any, AfterValidator(_finite_number)]
Positive = Annotated[Number, Field(gt=0)]
Whole = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
RunId = Annotated[Any, AfterValidator(_run_id)]
Role = Literal["tune", "confirm"]
Section = Annotated[Any, BeforeValidator(_mapping)]
Names = str | list[str] | None


@with_config(SHAPE)
class Method(TypedDict):
    name: str
    r: NotRequired[Whole | None]
    alpha: NotRequired[str | Number | None]
    target_modules: NotRequired[Names]


@with_config(SHAPE)
class Optimizer(TypedDict):
    lr: Positive


@with_config(SHAPE)
class Config(TypedDict):
    method: Method
    optimizer: Optimizer
    seed: Whole
    model: NotRequired[Section]
    task: NotRequired[Section]
    trainer: NotRequired[Section]
    role: NotRequired[Role]


@with_config(SHAPE)
class Resources(TypedDict, total=False):
    train_seconds: Number | None
    eval_seconds: Number | None
    pack_seconds: Number | None
    peak_memory_bytes: Number | None
    tokens_per_second: Number | None
    pack_size: Whole | None
    trainable_parameters: Whole | None
    total_parameters: Whole | None
    beyond_adapters: Whole | None
    steps: Whole | None
    examples: Whole | None
    tokens: Whole | None
    train_examples: Whole | None
    val_examples: Whole | None
    test_examples: Whole | None


@with_config(SHAPE)
class Metrics(TypedDict, total=False):
    best_step: Whole | None
    pruned_step: Whole | None


@with_config(SHAPE)
class Record(TypedDict):
    run_id: RunId
    role: Role
    status: Literal["completed", "failed", "diverged", "pruned"]
    config: Config
    metrics: NotRequired[Annotated[Metrics, AfterValidator(_scores)]]
    resources: NotRequired[Resources]
    provenance: NotRequired[Section]
    error: NotRequired[str | None]
    schema: NotRequired[Literal[1]]


@with_config(SHAPE)
class Label(TypedDict):
    method: str
    r: NotRequired[Whole | None]
    alpha: NotRequired[Number | None]
    alpha_rule: NotRequired[str | None]
    targets: NotRequired[str | None]
    trainable: NotRequired[Whole | None]
    extra: NotRequired[Section | None]


@with_config(SHAPE)
class CellRuns(TypedDict, total=False):
    tune: list[RunId]
    confirm: list[RunId]


@with_config(SHAPE)
class Solo(TypedDict, total=False):
    seconds: Number | None
    tokens: Number | None
    steps: Number | None
    peak_memory_bytes: Number | None
    reused_blocks: Number | None
    trunk_seconds: Number | None


@with_config(SHAPE)
class Cell(TypedDict):
    id: str
    label: Label
    runs: CellRuns
    solo: NotRequired[Solo]


@with_config(SHAPE)
class Listed(TypedDict):
    lr: Positive
    seed: Whole
    role: NotRequired[Role]
    config: NotRequired[Config]
    asked: NotRequired[list[str]]


@with_config(SHAPE)
class Pack(TypedDict):
    id: str
    runs: list[RunId]


@with_config(SHAPE)
class Study(TypedDict, total=False):
    question: str | None
    reference: str | None
    margin: Positive | None


@with_config(SHAPE)
class Settled(TypedDict, total=False):
    device: str
    precision: str


@with_config(SHAPE)
class Manifest(TypedDict):
    schema: Literal[1]
    name: NotRequired[str | None]
    experiment: NotRequired[str | None]
    command: NotRequired[list[str]]
    study: NotRequired[Study]
    study_hash: NotRequired[str | None]
    frozen: NotRequired[dict[str, Any]]
    units: NotRequired[dict[str, str]]
    cells: NotRequired[list[Cell]]
    runs: NotRequired[dict[RunId, Listed]]
    packs: NotRequired[list[Pack]]
    settled: NotRequired[Settled]


RECORD = TypeAdapter(Record)
MANIFEST = TypeAdapter(Manifest)


def first_error(shape: TypeAdapter[Any], value: Any) -> str | None:
    """Return the first thing wrong with a value, as `cells.0.label: Field required`; None where it fits. Never
    raises."""
    try:
        shape.validate_python(value, strict=True)
    except ValidationError as e:
        error = e.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(part) for part in error["loc"])
        message = error["msg"].removeprefix("Value error, ")
        return f"{place}: {message}" if place else message
    except RecursionError:
        return "nested too deeply"
    return None
