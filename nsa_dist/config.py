"""Configuration: structured, checked before anything starts.

A recipe (YAML) is laid over the defaults below, `key=value` words over the recipe. A wrong key or value is
an error of one line that names it and what is allowed.
"""

import difflib
import math
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nsa_dist.errors import ConfigError as ConfigError
from nsa_dist.kernels import NSASpec
from nsa_dist.store import check_known

AUTO = "auto"
LAYER_KINDS = ("nsa", "full", "window")
CHOICES = {
    "train.dtype": ("float32", "bfloat16", "float64"),
    "train.schedule": ("cosine", "constant_decay"),
    "train.activation_checkpoint": ("none", "layer"),
    "parallel.layout": ("contiguous", "zigzag", "uneven", "auto"),
    "parallel.exchange": ("nsa", "allgather", "allgather_heads", "groupcast", "ulysses"),
    "parallel.full_exchange": ("ring", "allgather", "ulysses"),
    "parallel.grad_dtype": ("float32", "bfloat16", "float64"),
    "nsa.compression": ("mlp", "mean"),
    "launch.backend": ("ray", "torchrun"),
    "launch.device": ("auto", "cpu", "cuda"),
}


@dataclass
class RunConfig:
    dir: str = "runs/default"  # everything that the run leaves
    store: str = ""  # where its checkpoints are kept: another folder, or any fsspec URL; "": run.dir
    seed: int = 0
    resume: str = "auto"  # auto, never, or a checkpoint's or run's folder


@dataclass
class ModelConfig:
    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int = 1
    head_dim: int = 32  # of query and key
    value_dim: int = 0  # of value; 0: as head_dim
    ffn: int = 0  # 0: 8/3 of the width, rounded up to a multiple of 64
    attention: list[str] = field(default_factory=lambda: ["nsa"])  # kind of each layer, repeated to the last
    vocab_size: int = 0  # 0: as many as the tokenizer has
    rope_base: float = 10000.0
    yarn_factor: float = 1.0  # 1: plain RoPE; s > 1: YaRN (arXiv 2309.00071) from yarn_original to s times it
    yarn_original: int = 4096
    norm_eps: float = 1e-6
    init_std: float = 0.02
    tie_embeddings: bool = False


@dataclass
class NSAConfig:
    compress_block: int = 32
    compress_stride: int = 16
    select_block: int = 64
    select_count: int = 16
    initial_blocks: int = 1
    local_blocks: int = 2
    window: int = 512
    span: int = 0  # tokens of a span, whose queries select few blocks outside it; 0: no bound
    span_blocks: float = 0.0  # the bound: a number of blocks, or below 1 a share of the blocks before the span
    span_prefetch: float = 1.0  # of them known before the span starts: a number, or up to 1 a share
    span_pool: int = 1024  # queries before a span whose scores decide that
    share_kv: bool = False  # one K/V projection for the three branches (models converted from dense ones)
    compression: str = "mlp"


@dataclass
class SourceConfig:
    path: str = ""
    weight: float = 1.0


@dataclass
class DataConfig:
    source: str = "builtin:python-stdlib"  # text, JSONL or Parquet file, a folder of them, or builtin:python-stdlib
    sources: list[SourceConfig] = field(default_factory=list)  # several, with weights; replaces data.source
    validation: Any = 0.05  # share of the documents held out, or a path
    tokenizer: str = "bytes"  # or a `tokenizers` file (JSON)
    eos_token: str = ""  # of a `tokenizers` file: put after each document where named
    shuffle_seed: int = 0
    seq_len: int = 4096
    batch_size: int = 1  # sequences in the global batch
    epochs: int = 0  # training ends after so many; 0: goes on to train.steps
    cache_dir: str = ""  # of prepared token files; "": $XDG_CACHE_HOME/nsa-dist or ~/.cache/nsa-dist


@dataclass
class TrainConfig:
    steps: int = 100
    lr: float = 3e-3
    min_lr: float = 0.1  # share of lr at the end
    warmup_steps: int = 10
    schedule: str = "cosine"
    decay_steps: int = 0  # of constant_decay; 0: a fifth of the steps
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0  # norm of the gradient; 0: not clipped
    dtype: str = "float32"  # of the computation; bfloat16 keeps float32 parameters and optimiser state
    checkpoint_every: int = 50  # steps; 0: only at the end
    keep_checkpoints: int = 2
    validate_every: int = 50  # steps; 0: only at the end
    validation_sequences: int = 4
    activation_checkpoint: str = "none"  # layer: a layer's activations are recomputed, its attention's kept
    log_every: int = 1


@dataclass
class ParallelConfig:
    dp: Any = 1  # sequences at a time; auto: as many as there is room for, see nsa_dist.auto
    cp: Any = 1  # ranks that share a sequence; or auto
    shard: int = 0  # ranks that share one copy of the parameters; 0: all
    layout: str = "contiguous"  # uneven: contiguous parts of equal work; auto: the fastest for each sequence
    exchange: str = "nsa"  # of NSA layers
    full_exchange: str = "ring"  # of full-attention layers
    exchange_max_bytes: int = 0  # of fetched KV held at a time in a layer; 0: no bound
    grad_dtype: str = "float32"  # in which gradients travel between ranks (float64 in a float64 run)


@dataclass
class LaunchConfig:
    backend: str = "ray"
    device: str = "auto"
    timeout_s: int = 600  # of a collective
    heartbeat_s: int = 300  # a rank that has made no step for so long hangs; 0: not looked for
    max_failures: int = 3  # starts again after so many failures without a new checkpoint between them
    wait_s: int = 600  # for places, where a failure has left too few


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    nsa: NSAConfig = field(default_factory=NSAConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)


_SECTIONS = tuple(f.name for f in fields(Config))
_KINDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    ListConfig: "a list, e.g. [a, b]",
    DictConfig: "a mapping",
}


def load_config(path: str | None, overrides: list[str]) -> Config:
    """A checked configuration from a recipe's path and `key=value` words.

    Raises ConfigError for a missing file, an unknown key, a value of the wrong type or out of range.
    """
    layers = [] if path is None else [_read_yaml(path)]
    for word in overrides:
        key, sep, _ = word.partition("=")
        if not sep or not key:
            raise ConfigError(f"argument '{word}': settings are written key=value, e.g. parallel.cp=4")
        _check_key(key)
        try:
            layers.append(OmegaConf.from_dotlist([word]))
        except Exception as error:
            raise ConfigError(f"{key}: can't read the value in '{word}' ({_reason(error)})") from None
    merged = OmegaConf.structured(Config)
    for layer in layers:
        for key in _leaf_keys(layer):
            _check_key(key)
        try:
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            raise ConfigError(_misfit(error, merged, layer)) from None
    return check_config(_to_object(merged))


def config_from_dict(values: dict[str, Any]) -> Config:
    """The inverse of `dataclasses.asdict`, for a configuration that a run's folder or another process holds."""
    return _to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(values)))


def nsa_spec(config: NSAConfig) -> NSASpec:
    """The NSASpec of a configuration. Raises ConfigError where the spec can't work."""
    try:
        return NSASpec(**{f.name: getattr(config, f.name) for f in fields(NSASpec)})
    except ValueError as error:
        raise ConfigError(f"nsa.{error}") from None


def layer_kinds(model: ModelConfig) -> list[str]:
    """The attention kind of each layer: `model.attention` repeated."""
    return [model.attention[i % len(model.attention)] for i in range(model.layers)]


def _to_object(config: Any) -> Config:
    result = OmegaConf.to_object(config)
    assert isinstance(result, Config)
    return result


def _reason(error: Exception) -> str:
    """In one line; of a YAML error what is wrong and where, which come after its first line."""
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        return f"line {mark.line + 1}: {getattr(error, 'problem', None)}"
    return str(error).strip().splitlines()[0]


def _misfit(error: OmegaConfBaseException, merged: Any, layer: Any) -> str:
    """What of `layer` is of another type than in `merged`."""
    key = getattr(error, "full_key", None) or "configuration"
    kind = _KINDS.get(type(OmegaConf.select(merged, key)))
    return f"{key}={OmegaConf.select(layer, key)}: must be {kind}" if kind else f"{key}: {_reason(error)}"


def _read_yaml(path: str) -> DictConfig:
    if not Path(path).is_file():
        near = difflib.get_close_matches(path, [str(p) for p in Path(path).parent.glob("*.yaml")], 1)
        hint = f"; nearest: {near[0]}" if near else ""
        raise ConfigError(f"configuration '{path}': no such file{hint}")
    try:
        layer = OmegaConf.load(path)
    except Exception as error:
        raise ConfigError(f"configuration '{path}': not YAML ({_reason(error)})") from None
    if not isinstance(layer, DictConfig):
        raise ConfigError(f"configuration '{path}': must be a mapping of sections, e.g. 'model:'")
    return layer


def _known_keys(cls: Any = Config, prefix: str = "") -> list[str]:
    keys = []
    for f in fields(cls):
        keys.append(prefix + f.name)
        inner = f.default_factory() if callable(f.default_factory) else None
        if is_dataclass(inner):
            keys += _known_keys(inner, prefix + f.name + ".")
    return keys


def _leaf_keys(layer: Any, prefix: str = "") -> list[str]:
    keys = []
    for key in layer:
        name = f"{prefix}{key}"
        try:
            value = layer[key]
        except OmegaConfBaseException as error:
            raise ConfigError(f"{name}: {_reason(error)}") from None
        if not prefix and not isinstance(value, DictConfig) and name.partition(".")[0] in _SECTIONS:
            raise ConfigError(f"{name}={value}: must be keys in a section, e.g. model: {{layers: 4}}")
        keys += _leaf_keys(value, name + ".") if isinstance(value, DictConfig) else [name]
    return keys


def _check_key(key: str) -> None:
    known = _known_keys()
    if key in known:
        return
    near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
    last = [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    hint = f"; nearest: {(last or near)[0]}" if last or near else f"; sections: {', '.join(_SECTIONS)}"
    raise ConfigError(f"unknown key '{key}'{hint}")


def _get(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def check_config(config: Config) -> Config:
    """Raises ConfigError for what can be known wrong from the configuration alone; returns it unchanged."""
    for key, allowed in CHOICES.items():
        value = _get(config, key)
        if value not in allowed:
            near = difflib.get_close_matches(str(value), allowed, 1)
            hint = f"; nearest: {near[0]}" if near else ""
            raise ConfigError(f"{key}={value}: must be one of {', '.join(allowed)}{hint}")
    for key in ("parallel.dp", "parallel.cp"):
        value = _get(config, key)
        _require(
            value == AUTO or (type(value) is int and value >= 1), key, value, "an integer of at least 1, or auto"
        )
    at_least_one = "model.layers model.width model.heads model.kv_heads model.head_dim data.seq_len data.batch_size"
    for key in (at_least_one + " train.steps train.log_every launch.timeout_s").split():
        _require(_get(config, key) >= 1, key, _get(config, key), "at least 1")
    zero_or_more = "model.value_dim model.ffn model.vocab_size data.epochs parallel.exchange_max_bytes"
    zero_or_more += " parallel.shard train.warmup_steps train.decay_steps train.checkpoint_every run.seed"
    zero_or_more += " train.validate_every train.validation_sequences train.clip train.weight_decay"
    zero_or_more += " launch.heartbeat_s launch.max_failures launch.wait_s"
    for key in (zero_or_more + " data.shuffle_seed train.keep_checkpoints").split():
        _require(_get(config, key) >= 0, key, _get(config, key), "0 or more")
    for key, value in _integers(config):
        _require(value < 1 << 63, key, value, "below 2**63")
    # Ids and offsets of a sequence's tokens are int32; a timeout beyond a year overflows the libraries' types.
    _require(config.data.seq_len < 1 << 31, "data.seq_len", config.data.seq_len, "below 2**31")
    _require(config.data.seq_len >= 2, "data.seq_len", config.data.seq_len, "at least 2 (a lone token has no label)")
    _require(config.launch.timeout_s <= 31536000, "launch.timeout_s", config.launch.timeout_s, "at most 31536000")
    for key in ("train.lr", "train.eps", "model.norm_eps", "model.init_std"):
        value = _get(config, key)
        _require(math.isfinite(value) and value > 0, key, value, "above 0")
    for key in ("train.beta1", "train.beta2"):
        _require(0 <= _get(config, key) < 1, key, _get(config, key), "from 0 up to, not including, 1")
    for key in ("train.weight_decay", "train.clip"):  # found only in a checkpoint otherwise
        _require(math.isfinite(_get(config, key)), key, _get(config, key), "finite")
    _require(0 <= config.train.min_lr <= 1, "train.min_lr", config.train.min_lr, "from 0 to 1")
    for key in ("run.store", "run.resume"):
        check_known(key, _get(config, key))
    _check_model(config)
    _check_parallel(config)
    _check_sources(config)
    return config


def _integers(config: Config) -> list[tuple[str, int]]:
    leaves = [(key, _get(config, key)) for key in _known_keys() if key.count(".") == 1]
    return [(key, value) for key, value in leaves if type(value) is int]


def _require(fine: bool, key: str, value: Any, allowed: str) -> None:
    if not fine:
        raise ConfigError(f"{key}={value}: must be {allowed}")


def _check_model(config: Config) -> None:
    model = config.model
    _require(len(model.attention) >= 1, "model.attention", model.attention, f"a list of {', '.join(LAYER_KINDS)}")
    for kind in model.attention:
        _require(kind in LAYER_KINDS, "model.attention", kind, f"one of {', '.join(LAYER_KINDS)}")
    if model.heads % model.kv_heads:
        raise ConfigError(f"model.heads={model.heads}: must be a multiple of model.kv_heads={model.kv_heads}")
    _require(model.head_dim % 2 == 0, "model.head_dim", model.head_dim, "even (RoPE turns pairs)")
    _require(math.isfinite(model.rope_base) and model.rope_base > 1, "model.rope_base", model.rope_base, "above 1")
    factor = model.yarn_factor
    _require(math.isfinite(factor) and factor >= 1, "model.yarn_factor", factor, "1 or more, and finite")
    _require(model.yarn_original >= 1, "model.yarn_original", model.yarn_original, "at least 1")
    nsa_spec(config.nsa)


def _check_parallel(config: Config) -> None:
    parallel, model, data = config.parallel, config.model, config.data
    if AUTO in (parallel.dp, parallel.cp):  # checked once more when both are numbers
        dp, cp = (1 if value == AUTO else value for value in (parallel.dp, parallel.cp))
        parallel = replace(parallel, dp=dp, cp=cp, shard=0)
    if data.batch_size % parallel.dp:
        raise ConfigError(f"data.batch_size={data.batch_size}: must be a multiple of parallel.dp={parallel.dp}")
    world = parallel.dp * parallel.cp
    if parallel.shard and world % parallel.shard:
        raise ConfigError(f"parallel.shard={parallel.shard}: must divide the {world} ranks (dp x cp)")
    segments = parallel.cp * (2 if parallel.layout == "zigzag" else 1)
    blocks = -(-data.seq_len // config.nsa.select_block)
    if blocks < segments:
        raise ConfigError(
            f"data.seq_len={data.seq_len}: {blocks} selection blocks of {config.nsa.select_block} tokens for "
            f"{segments} segments (parallel.cp={parallel.cp}, {parallel.layout}); "
            f"must be at least {(segments - 1) * config.nsa.select_block + 1} tokens"
        )
    kinds = layer_kinds(model)
    ulysses = [
        key
        for key, kind in (("parallel.exchange", "nsa"), ("parallel.full_exchange", "full"))
        if kind in kinds and _get(config, key) == "ulysses"
    ]
    if ulysses and (parallel.cp > model.kv_heads or model.kv_heads % parallel.cp):
        raise ConfigError(
            f"{ulysses[0]}=ulysses: parallel.cp={parallel.cp} must divide model.kv_heads={model.kv_heads} "
            "(a rank takes whole KV heads)"
        )
    size = {"float32": 4, "bfloat16": 2, "float64": 8}[config.train.dtype]
    row_bytes = (model.head_dim + (model.value_dim or model.head_dim)) * size
    least = config.nsa.select_block * row_bytes
    bound = parallel.exchange_max_bytes
    if bound and bound < least:
        raise ConfigError(
            f"parallel.exchange_max_bytes={bound}: must be 0 or at least {least} (one block of one KV head)"
        )


def _check_sources(config: Config) -> None:
    for source in config.data.sources:
        _require(bool(source.path), "data.sources", source, "a list of {path: ..., weight: ...}")
        _require(
            math.isfinite(source.weight) and source.weight > 0,
            "data.sources weight",
            source.weight,
            "above 0",
        )
    value = config.data.validation
    share = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not share and not isinstance(value, str):
        raise ConfigError(f"data.validation={value}: must be a path, or a share from 0 to 0.5")
    if share:
        _require(0 <= value <= 0.5, "data.validation", value, "a path, or a share from 0 to 0.5")
