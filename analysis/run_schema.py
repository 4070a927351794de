"""Names, units, directions and kinds of everything a run records.

This is the contract between the one writer of MLflow (`study.tracking`) and its one reader (`analysis.runs.load`). It
uses only the standard library, so that both sides can import it at no cost.

One MLflow experiment holds one study. Its runs are of three kinds, distinguished by the tag `KIND`: a *trial* (one
configuration, the parent run), a *seed* (one trial × one seed, its child) and at most one *summary* of the experiment.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

SCHEMA_VERSION = 2

Direction = Literal["minimize", "maximize"]
Recorded = Literal["curve", "last", "best", "once", "count"]

STUDY_MANIFEST = "study.json"
"""File in a study directory: {"schema_version", "name", "uuid", "tracking_uri", "experiment", "storage"}. tracking_uri
is null if tracking was off in the last run; a relative SQLite path in it is relative to the study directory. storage is
null if it is the study directory's own."""

# Tags -----------------------------------------------------------------------------------------------------------------

KIND = "mpo.kind"
KIND_TRIAL, KIND_SEED, KIND_SUMMARY = "trial", "seed", "summary"
KEY = "mpo.key"
"""Identity of a run: the study's UUID, the trial and the seed; writing a key twice changes nothing."""
STUDY_NAME = "mpo.study"
STUDY_UUID = "mpo.study_uuid"
SCHEMA = "mpo.schema_version"
FAMILY = "mpo.family"
ARM = "mpo.arm"
"""On trials and seeds: the params of the same names, as tags with which MLflow's UI groups and filters."""
VALIDATION_FRACTION = "mpo.validation_fraction"
"""On a trial: the fraction of the corpus, at its end, used for validation."""
DUPLICATE_OF = "mpo.duplicate_of"
"""On a trial (and its runs) with the same configuration as an earlier trial: the number of that trial."""
SKIPPED = "mpo.skipped"
"""On a trial that was never trained because its parameters break a limit of the search: the limit, in one line."""
STOPPED = "mpo.stopped"
"""On a trial that was stopped early: the rival that beat it, by how much, and on which seeds."""
DEVICE, THREADS, TORCH, STACKED = "mpo.device", "mpo.threads", "mpo.torch", "mpo.stacked"
PROGRAM = "mpo.program"
RAN_ON = (DEVICE, THREADS, TORCH, STACKED, PROGRAM)
"""On a seed: the conditions on which its numbers depend up to rounding. `STACKED` is the number of seeds that were
trained as one model. `PROGRAM` is the fingerprint of the training code and of its versions of torch and numpy: with
another fingerprint, the numbers may differ in any way."""
CLAIMS = "mpo.claims"
"""On the summary: JSON of what the study file declared before it ran, {"margins": {"val_loss": nats, "val_acc":
fraction}, "contrasts": [{"arm", "against"}, ...]}."""
MISSING = "mpo.missing"
"""On the summary: number of runs (trial × seed) that the study lacked when its driver last began or ended."""
GROWTHS = "mpo.growths"
"""On the summary: JSON of how the study grew after its start, [{"by": command, "seeds": [seeds of each trial before,
and after], "over": how many of the recorded runs were over then}, ...]."""
ENVIRONMENT = "mpo.environment"
"""On the summary: JSON of the environment at the study's start, {"python", "packages": {name: version}, "program":
fingerprint, "git_commit", "git_changed", "system", "cpus"}."""
FAILURE = "mpo.failure"
"""On a failed seed: the reason, in one line."""
WEIGHTS_LOST = "mpo.weights_lost"
"""On a seed whose trained weights vanished from storage before MLflow got them: their key in the storage."""
FAILURE_STEP = "mpo.failure_step"
REVISION = "mpo.revision"
"""On the summary run, while the experiment is as its writer left it, whole and with nothing running: a name that no
other state of it ever had, then a slash and the number of its runs. The writer removes the tag before it changes
anything. So data that was read under one revision is valid while that revision and that number of runs are there."""
PARENT = "mlflow.parentRunId"
DIGEST = "mpo.digest"
"""On every run: its `digest` as written, so that a change by somebody else is detected. It is out of date while the run
is being written."""

TAG_LIMIT = 5000
"""Length of a tag, in characters, that every backend of MLflow accepts; some silently cut off a longer one."""
_PARTS = re.compile(r"(\d+) parts, SHA-256 ([0-9a-f]{64})")


def tag_text(text: str) -> str:
    """The text in a form that every backend accepts in one tag: cut off if too long, invalid characters replaced."""
    text = text.encode(errors="replace").decode().replace("\0", "?")
    return text if len(text) <= TAG_LIMIT else text[: TAG_LIMIT - 1] + "…"


def long_tag(tag: str, text: str) -> dict[str, str]:
    """Tags that hold a text of any length: one of that name, and tags for its parts if it is too long for one."""
    if len(text) <= TAG_LIMIT:
        return {tag: text}
    parts = [text[start : start + TAG_LIMIT] for start in range(0, len(text), TAG_LIMIT)]
    head = f"{len(parts)} parts, SHA-256 {hashlib.sha256(text.encode()).hexdigest()}"
    return {tag: head} | {f"{tag}.{number}": part for number, part in enumerate(parts, 1)}


def read_long_tag(tags: Mapping[str, str], tag: str) -> str | None:
    """The text that `long_tag` stored; None if there is none.

    Raises:
        ValueError: some of its parts are missing or changed.
    """
    head = tags.get(tag)
    split = _PARTS.fullmatch(head or "")
    if head is None or split is None:
        return head
    text = "".join(tags.get(f"{tag}.{number}", "") for number in range(1, int(split[1]) + 1))
    if hashlib.sha256(text.encode()).hexdigest() != split[2]:
        raise ValueError(f"not all of its {split[1]} parts are there as they were written")
    return text


def run_key(study_uuid: str, trial: int, seed: int | None = None) -> str:
    """The value of the tag `KEY` for a trial (`seed` None) or for one of its seeds."""
    return f"{study_uuid}/{trial}" if seed is None else f"{study_uuid}/{trial}/{seed}"


# Fields ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Field:
    """One recorded quantity.

    `kind` "param": a string in MLflow, read back as `dtype`; absent if it has no meaning for the family. "curve": a
    metric logged at every evaluation, step = optimiser step. "final": a metric logged once per seed.
    "count": a metric logged once, on the trial and on each of its seeds.
    """

    key: str
    kind: Literal["param", "curve", "final", "count"]
    dtype: type
    label: str
    direction: Direction | None = None


@dataclass(frozen=True)
class Metric:
    """One measured quantity. To add one, add a line to `METRICS` and compute it, under its name, in `study.training`.

    recorded: "curve": at every evaluation, as NAME. "last": at the last one, as final/NAME. "best": the best value of
    any evaluation, which is optimistic, as best/NAME. "once": once per seed, as NAME. "count": once per trial, as NAME.
    direction: what is better; such a metric may be an objective of a study file, by its name, unless it is only in the
    curve. margin: how much worse still counts as equal if a study file names no margin; claims rest on these metrics.
    """

    name: str
    dtype: type
    label: str
    recorded: tuple[Recorded, ...]
    unit: str = ""
    direction: Direction | None = None
    margin: float | None = None

    def fields(self) -> Iterator[Field]:
        for recorded in self.recorded:
            kind = {"last": "final", "best": "final", "once": "final"}.get(recorded, recorded)
            key = {"last": f"final/{self.name}", "best": f"best/{self.name}"}.get(recorded, self.name)
            yield Field(key, kind, self.dtype, self.label, self.direction)  # type: ignore[arg-type]


PARAMS = (
    Field("trial", "param", int, "trial number"),
    Field("seed", "param", int, "seed (on seed runs only)"),
    Field("arm", "param", str, "arm of the study file"),
    Field("family", "param", str, "kind of the linear layers: dense, mpo, low_rank and so on"),
    Field("family_label", "param", str, "name of the family in figures and tables"),
    Field("start", "param", str, "scratch, or the arm whose trained model the trial began from"),
    Field("chi", "param", int, "bond-dimension cap χ"),
    Field("as_chi", "param", int, "χ of the MPO whose layers limit the size of a control's layers"),
    Field("n_sites", "param", int, "requested number of sites L"),
    Field("factorisation", "param", str, "how sizes split over sites"),
    Field("sites", "param", str, "actual numbers of sites of the compressed layers"),
    Field("largest_bond", "param", int, "largest bond of any layer, after clipping"),
    Field("init", "param", str, "init mode"),
    Field("refinement", "param", str, "how trained weights became factors"),
    Field("keep", "param", float, "share of the replaced layers' parameters that is kept, masks and indices counted"),
    Field("metric", "param", str, "which error compression keeps small: weights, outputs, loss"),
    Field("spread", "param", str, "how kept parameters are spread over layers: loss, errors, even"),
    Field("narrow", "param", str, "whether compression may remove hidden units of MLPs"),
    Field("resized", "param", str, "settings of the study's model that this dense arm changes"),
    Field("layers", "param", str, "patterns of the layers that are replaced, if not the usual ones"),
    Field("heal", "param", str, "what was trained after compression, and by which loss; absent: all, cross-entropy"),
    Field("lr_rule", "param", str, "learning rates of the cores: uniform, mup"),
    Field("decay", "param", str, "what weight decay shrinks: each parameter, or the matrix"),
    Field("gauge", "param", str, "gauge of the factors: free, fixed"),
    Field("options", "param", str, "options of the kind of layer"),
    Field("bonds", "param", str, "how the bonds changed during the training; absent: they did not"),
    Field(
        "sweep", "param", int, "steps for each core if one core of a layer is trained at a time; absent: all at once"
    ),
    Field("forward", "param", str, "how an MPO layer is applied: reconstruct, chain"),
    Field("optimiser", "param", str, "optimiser: adamw, muon"),
    Field("learning_rate", "param", float, "peak learning rate"),
    Field("embedding_learning_rate", "param", float, "peak learning rate of the embeddings, if they have their own"),
    Field("ema", "param", float, "decay of the averaged weights that are evaluated too; absent: there are none"),
    Field("rate_width", "param", int, "d_model at which the rates of matrices hold; absent: they are used as they are"),
    Field("schedule", "param", str, "schedule of the learning rate: cosine, wsd"),
    Field("steps", "param", int, "optimiser steps"),
    Field("warmup_steps", "param", int, "warm-up steps"),
    Field("batch_size", "param", int, "sequences per step"),
    Field("context", "param", int, "context length"),
    Field("precision", "param", str, "of matrix products: float32, tf32, bfloat16 (the forward pass by autocast)"),
    Field("tokenizer", "param", str, "what a token is: characters, bytes, or a folder's tokenizer with its checksum"),
    Field("vocab_size", "param", int, "vocabulary size V"),
    Field("model", "param", str, "the study's model and its settings, if it is not PicoGPT"),
    Field("model_sha256", "param", str, "SHA-256 of pretrained weights, or of a user's own module"),
    Field("d_model", "param", int, "embedding dimension"),
    Field("n_heads", "param", int, "attention heads"),
    Field("n_layers", "param", int, "transformer layers"),
    Field("d_ff", "param", int, "feed-forward dimension"),
    Field("weight_decay", "param", float, "weight decay"),
    Field("tuning_trials", "param", int, "number of trials among which init, rates and decay are chosen; 1: no choice"),
    Field("tuned_among", "param", int, "the part of tuning_trials in an earlier study, per trial of this study"),
    Field("budget_hash", "param", str, "hash of corpus, evaluation, tokens, schedule, tuning trials, precision"),
    Field("corpus_sha256", "param", str, "SHA-256 of the text of the corpus"),
)

ABSENT = {"model": "PicoGPT", "tokenizer": "characters", "optimiser": "adamw", "schedule": "cosine"}
"""Values of params that are not recorded: runs from before there was a choice lack them, and stay as they are."""

ALL: tuple[Recorded, ...] = ("curve", "last", "best")
LAST: tuple[Recorded, ...] = ("curve", "last")
METRICS = (
    Metric("val_loss", float, "validation loss, full validation split", ALL, "nats", "minimize", margin=0.02),
    Metric("val_acc", float, "validation token accuracy, full validation split", ALL, "fraction", "maximize", 0.005),
    Metric("bits_per_byte", float, "validation loss per byte of text, full validation split", ALL, "bits", "minimize"),
    Metric("val_loss_sampled", float, "validation loss, random batches as in the paper", LAST, "nats", "minimize"),
    Metric("val_acc_sampled", float, "validation accuracy, batches as in the paper", LAST, "fraction", "maximize"),
    Metric("ema_val_loss", float, "validation loss of the averaged weights", LAST, "nats", "minimize"),
    Metric("ema_val_acc", float, "validation token accuracy of the averaged weights", LAST, "fraction", "maximize"),
    Metric("train_loss", float, "training loss, mean since the last evaluation", LAST, "nats", "minimize"),
    Metric("learning_rate", float, "learning rate", ("curve",)),
    Metric("tokens", int, "training tokens so far", ("curve",), "tokens"),
    Metric("best/step", int, "step of the lowest validation loss", ("once",), "steps"),
    Metric("train_seconds", float, "wall time of training, a seed's share of its block's", ("once",), "s", "minimize"),
    Metric("train_tokens", int, "tokens this run trained on", ("once",), "tokens"),
    Metric("total_tokens", int, "tokens trained on, including the start's", ("once",), "tokens"),
    Metric("kept", float, "share of the replaced layers' parameters that this seed has, of `keep`", ("once",)),
    Metric("n_params_end", int, "trainable parameters at the end, if bonds change", ("once",), "parameters"),
    Metric("predicted_loss", float, "predicted rise of the loss by compression, fitted batches", ("once",), "nats"),
    Metric("held_out_loss", float, "predicted rise of the loss, held-out calibration batches", ("once",), "nats"),
    Metric("n_params", int, "trainable parameters", ("count",), "parameters", "minimize"),
    Metric("n_params_compressed", int, "parameters of the compressed matrices only", ("count",), "", "minimize"),
    Metric("n_params_dense", int, "parameters of the study's dense reference model", ("count",)),
    Metric("bytes", int, "size of the stored model, masks and indices included", ("count",), "bytes", "minimize"),
    Metric("flops_per_token", float, "FLOPs per token of a forward pass", ("count",), "FLOPs", "minimize"),
    Metric("decode_ms", float, "time to decode a token at batch 1, on the worker", ("once",), "ms", "minimize"),
    Metric("prefill_ms", float, "time to read a context at batch 1, on the worker", ("once",), "ms", "minimize"),
    Metric("dense_decode_ms", float, "the same of a dense model of its sizes, in turns", ("once",), "ms"),
    Metric("dense_prefill_ms", float, "the same of a dense model of its sizes, in turns", ("once",), "ms"),
)

NEWER_COUNTS = ("bytes", "flops_per_token")
"""Counts that trials of older studies lack."""

_FIELDS = (*PARAMS, *(field for metric in METRICS for field in metric.fields()))
FIELDS = {(field.kind, field.key): field for field in _FIELDS}
CURVES, FINALS, COUNTS = (
    tuple(field for field in FIELDS.values() if field.kind == kind) for kind in ("curve", "final", "count")
)
OBJECTIVES = {
    metric.name: metric for metric in METRICS if metric.direction and {"last", "once", "count"} & {*metric.recorded}
}
"""The metrics that a sampler can optimise, by their names in study files."""
LEVEL = 0.05
"""Chance of any false claim among all that a study declares, two-sided. The levels of several looks add up to it."""

MIN_SEEDS = 3
"""With fewer seeds nothing is claimed: intervals, tests and bounds are NaN."""

MARGINS = {metric.name: metric.margin for metric in METRICS if metric.margin is not None}
"""How much worse still counts as equal. A study file may say otherwise. Claims rest on these metrics: a complete
seed has finite values of them. Any other metric may be absent."""
CLAIMED = tuple(f"final/{name}" for name in MARGINS)


def direction_of(objective: str) -> Direction:
    """Whether a lower or a higher value of the objective is better."""
    direction = OBJECTIVES[objective].direction
    assert direction is not None
    return direction


def key_of(metric: Metric) -> str:
    """The key under which a seed or a trial has the value of an objective."""
    return f"final/{metric.name}" if "last" in metric.recorded else metric.name


def mean_key(key: str) -> str:
    """Metric of a trial run: the mean over its complete seeds of the seed metric `key`."""
    return f"mean/{key}"


def std_key(key: str) -> str:
    """Metric of a trial run: the sample standard deviation (n - 1) over seeds; absent for one seed."""
    return f"std/{key}"


N_SEEDS = "n_seeds"
N_FAILED = "n_failed"
"""Metrics of a trial run: number of seeds in its aggregates, and number of failed seeds."""

# Relative error of each layer -----------------------------------------------------------------------------------------

WHEN = ("init", "trained", "compressed")
"""rel_error of a dense seed's layers before and after training, always with the factorisation `paper`; rel_error of the
start's layers at compression ("compressed")."""

_REL_ERROR = re.compile(r"rel_error/(init|trained|compressed)/chi_(\d+)/(.+)")


def rel_error_key(when: str, chi: int, layer: str) -> str:
    """Metric of a seed run: ‖W − Ŵ‖_F / ‖W‖_F of TT-SVD at cap `chi` on the layer with that module name."""
    return f"rel_error/{when}/chi_{chi}/{layer}"


def parse_rel_error_key(key: str) -> tuple[str, int, str] | None:
    """(when, chi, layer) of a key made by `rel_error_key`, or None for any other key."""
    match = _REL_ERROR.fullmatch(key)
    return (match[1], int(match[2]), match[3]) if match else None


# Bonds that change ----------------------------------------------------------------------------------------------------

_BOND = re.compile(r"bond/(.+)/(\d+)")


def bond_key(layer: str, number: int) -> str:
    """Metric of a seed run whose bonds change, at the start and after each change: the bond after core `number` of the
    layer with that module name."""
    return f"bond/{layer}/{number}"


def parse_bond_key(key: str) -> tuple[str, int] | None:
    """(layer, number) of a key made by `bond_key`, or None for any other key."""
    match = _BOND.fullmatch(key)
    return (match[1], int(match[2])) if match else None


# What a run holds -----------------------------------------------------------------------------------------------------

PARAM_KEYS = frozenset(field.key for field in PARAMS)
_OWN_METRICS = frozenset(
    [field.key for field in (*CURVES, *FINALS, *COUNTS)]
    + [of_seeds(field.key) for field in FINALS for of_seeds in (mean_key, std_key)]
    + [N_SEEDS, N_FAILED]
)
_NOT_CONTENT = (DIGEST, REVISION, MISSING, WEIGHTS_LOST)
"""Tags that may change while the content of a run stays the same."""


def is_own_metric(key: str) -> bool:
    """Return whether a metric of this name belongs to the study; anybody may log other metrics to its runs."""
    return key in _OWN_METRICS or parse_rel_error_key(key) is not None or parse_bond_key(key) is not None


def is_own_tag(tag: str) -> bool:
    """Return whether a tag belongs to a run's content; anybody may set tags without `mpo.`."""
    return tag.startswith("mpo.") and tag not in _NOT_CONTENT


def digest(params: Mapping[str, str], metrics: Mapping[str, float], tags: Mapping[str, str]) -> str:
    """SHA-256 of the study's own data in a run: params, the last value of each metric, and tags.

    If a field is removed from the schema, the digests of runs with it change: then `SCHEMA_VERSION` must change.
    """
    own = (
        sorted((key, text) for key, text in params.items() if key in PARAM_KEYS),
        sorted((key, float(value).hex()) for key, value in metrics.items() if is_own_metric(key)),
        sorted((key, text) for key, text in tags.items() if is_own_tag(key)),
    )
    return hashlib.sha256(json.dumps(own).encode()).hexdigest()
