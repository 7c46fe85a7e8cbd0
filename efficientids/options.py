"""The flags of a training run: their types, defaults and words, and which of them each recommender reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

LlamaSizeName = Literal["tiny", "small", "1b", "3b", "7b", "8b", "8b-3.1", "13b", "tinyllama-1.1b"]


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """What to train, on what, and where the result goes."""

    recommender: Literal["efficientids", "etegrec", "sasrec", "item_knn", "popularity"] = "efficientids"
    """The system to train. efficientids: item vectors in a Llama. etegrec: semantic IDs that a Llama generates. sasrec
    is the strong baseline; item_knn and popularity only count."""
    data_dir: Path | None = None
    """A data set folder (see `python -m efficientids prepare`). Default: a generated catalogue of invented films."""
    checkpoint_dir: Path | None = None
    """The run folder R: configuration, metrics, checkpoints; of a new run. Default: runs/RECOMMENDER-TIME."""
    load_checkpoint: str | None = None
    """R, R/STEP or R/checkpoints/STEP of an earlier run: start from its parameters (fresh optimiser, step 0)."""
    force: bool = False
    """Start on a GPU even where the plan says that memory will not do."""
    seed: int = 0
    """Of the random start, the data order and dropout."""
    log_every: int = 50
    """Steps a printed line."""
    eval_every: int | None = None
    """Steps between validations, each followed by a checkpoint. Default: once an epoch, or every 1000 steps where
    an epoch is longer."""
    eval_users: int | None = None
    """Validate on so many users, drawn once; the test at the end takes all. Default: all."""
    patience: int = 0
    """Stop after this many validations without a better NDCG@10; 0: never."""
    check_gradients: bool = False
    """Print, for each phase, what its loss gives to each part of the model at its start, or why nothing; then stop."""
    coordinator: str | None = None
    """HOST:PORT of process 0, where a job runs as several processes; with --num_processes and --process_id. Under Slurm
    (srun with several tasks) all three are found by themselves."""
    num_processes: int | None = None
    """How many processes the job has."""
    process_id: int | None = None
    """Which of them this is, from 0 on. Each is given the same other flags and sees the same --checkpoint_dir."""
    trackers: str | None = None
    """Experiment trackers to tell, comma-separated: wandb, mlflow, or names that installed plugins offer."""


@dataclasses.dataclass(frozen=True)
class LlamaOptions:
    """The Llama inside."""

    llama_size: LlamaSizeName = "tiny"
    """tiny and small start at random; every other size needs weights (HF_TOKEN or --weights) or --random_weights."""
    weights: Path | None = None
    """A local folder with config.json and safetensors or .bin weights; its config.json decides the size."""
    random_weights: bool = False
    """Start a published size at random instead of downloading its weights."""
    train: Literal["auto", "frozen", "lora", "full"] = "auto"
    """What trains of the Llama; item vectors and heads always do. auto: lora with --lora_rank, else full below 5
    billion parameters, LoRA (r 64, alpha 128) from there on."""
    freeze_llama: bool = False
    """The same as --train frozen."""
    lora_rank: int | None = None
    """r: columns of each adapter. Default: 64."""
    lora_alpha: float | None = None
    """Adapters count alpha / r times. Default: 2 r."""
    lora_targets: str | None = None
    """Which maps have adapters, of q,k,v,o,gate,up,down. Default: q,k,v,o."""
    lora_dropout: float | None = None
    """On the adapters' inputs. Default: 0."""
    quantize: Literal["none", "int8", "nf4"] = "none"
    """Hold the frozen weights of the Llama's layers in 8 or 4 bits (QLoRA); with --train lora or frozen."""
    llama_learning_rate: float | None = None
    """Peak learning rate of what trains of the Llama. Default: --learning_rate from scratch, else 2e-4 for LoRA, 5e-5
    for the whole Llama."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the computation, and of a frozen Llama's parameters; trained ones are float32. auto: bfloat16 on a GPU."""
    gradient_checkpointing: Literal["auto", "none", "dots", "full"] = "auto"
    """What the backward pass recomputes; dots: all but matrix products. auto: full from a width of 1,024, else dots."""
    attention: Literal["auto", "cudnn", "xla"] = "auto"
    """The kernel: cudnn (flash attention; bfloat16 on NVIDIA GPUs) or xla. auto: cudnn where it can be."""


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """Will it fit? Everything but the first goes with --estimate_memory_only."""

    estimate_memory_only: bool = False
    """Plan memory and time for --device, then stop; no GPU is needed. The same as `python -m efficientids plan`."""
    device: str = "rtx5090"
    """The GPU to plan for: rtx4090, rtx5090, rtx6000pro, a100-40, a100-80, h100, h200 or b200."""
    num_devices: int = 1
    """How many of them."""
    plan_by: Literal["auto", "estimate", "compiler", "run"] = "auto"
    """estimate: shapes alone. compiler: XLA's own account of the step compiled for the device. run: also three real
    steps on the GPU at hand. auto: the compiler where the CUDA plugin is installed, else the estimate."""
    quick: bool = False
    """Stop after the verdict: no other device counts, largest batch or advice."""
    json: bool = False
    """Print one JSON object at the end."""


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """How long, how fast, how much at a time."""

    num_steps: int | None = None
    """Optimiser steps; of etegrec's recommender alone, and rounded to whole turns of it. Exclusive with --epochs."""
    epochs: float | None = None
    """Passes over the users. Default: 10, with no --num_steps."""
    batch_size: int | None = None
    """Users with full-length histories in flight at a time, on all devices together; of shorter ones there are more.
    Default: 32 below a width of 1,024, else 8."""
    batch_size_per_device: int | None = None
    """The same, counted on one device (of a tensor group: together). Exclusive with --batch_size."""
    mesh: str = "auto"
    """Devices along data, fsdp and tensor, as in data=2,fsdp=4 (see core/sharding.py). auto: all GPUs, data parallel
    where the model fits on one, else fsdp; on a CPU one device."""
    length_buckets: int = 4
    """Shapes of batches: each has half the width and twice the rows of the one before. 1: all rows at full width."""
    pack_sequences: bool = False
    """Put several short histories into each row, kept apart; replaces length buckets. Worth it with text."""
    gradient_accumulation: int = 1
    """Batches an optimiser step."""
    learning_rate: float | None = None
    """Peak learning rate (of a pretrained Llama see --llama_learning_rate). Default: 1e-3 from scratch, else 5e-4."""
    warmup_steps: int | None = None
    """Default: 100 frozen, 500 trainable; at most a tenth of the steps."""
    weight_decay: float = 0.01
    """Decoupled; never on norms and biases."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 clips nothing."""
    dropout: float | None = None
    """On item inputs and residual branches. Default: SASRec 0.5, a random Llama below a width of 1,024 0.2, else 0."""
    seq_len: int = 64
    """Positions of the input: the newest items of a history, and with titles the text between them."""
    max_seq_len: int | None = None
    """The newest items of a history to look at. Default: what fits in --seq_len; with etegrec 20."""
    init_std: float | None = None
    """Deviation of item vectors and adapters at the start. Default: 0.02 for vectors, 1/√fan-in for adapters."""


@dataclasses.dataclass(frozen=True)
class ItemOptions:
    """EfficientIDS: item vectors and the softmax over them."""

    head: Literal["auto", "full", "two_level"] = "auto"
    """One softmax over all items, or clusters first. auto: full below 100,000 items."""
    num_clusters: int | None = None
    """Of the two-level head. Default: ⌈√N⌉, balanced k-means on co-occurrence vectors of the training histories."""
    clustering: Path | None = None
    """A file of given clusters (.npy or .json), one cluster id an item."""
    item_dim: int | None = None
    """Size of an item vector. Default: 384, or the Llama's width where that is smaller."""
    item_rank: int | None = None
    """Rank of the item table; default: full."""
    output_tying: Literal["adapter", "shared_mlp"] = "adapter"
    """adapter: hidden states come down to item vectors; shared_mlp: item vectors go up through the input adapter."""
    item_text: Literal["none", "title"] = "none"
    """Put each item's title behind it in the sequence."""
    title_tokens: int = 16
    """Tokens of a title to keep."""
    tokenizer: Path | None = None
    """tokenizer.json for titles, or a --prompt. Default: the one beside the weights."""
    text_loss_weight: float = 0.0
    """Weight of a title token's loss against an item's; 0: items only."""
    item_template: str | None = None
    """Text of an item: '{title}[ by {brand}]', a YAML file, or a shipped template's name. Default: the title alone."""


@dataclasses.dataclass(frozen=True)
class SASRecOptions:
    """SASRec: its shape. --seq_len is the number of items it looks at."""

    width: int = 64
    """Of item vectors and hidden states."""
    num_layers: int = 2
    """Transformer blocks."""
    num_heads: int = 2
    """Attention heads."""
    positions: Literal["learned", "rotary"] = "learned"
    """A vector for each position, or queries and keys turned by it."""
    temperature: float | None = None
    """Rank by cosines divided by this; default: by plain products."""


@dataclasses.dataclass(frozen=True)
class ItemKNNOptions:
    """Item-kNN: what stood near an item in other histories (formulas: efficientids/recommenders/item_knn.py)."""

    neighbours: int = 100
    """The most similar items kept of each item."""
    pair_window: int = 10
    """Places between two items of a history that still make a pair."""
    distance_power: float = 0.5
    """How fast a pair's weight falls with its distance; 0: not at all."""
    backward: float = 0.3
    """Weight of what came before an item against what came after it."""
    source_power: float = 0.5
    """How far the popularity of the history's item is divided out."""
    target_power: float = 0.1
    """How far the popularity of the candidate is divided out."""
    recency: float = 0.7
    """Weight of a history item against the next newer one."""
    popularity_weight: float = 1e-5
    """Weight of popularity; so small, it only orders items that are nobody's neighbour."""


@dataclasses.dataclass(frozen=True)
class SemanticIDOptions:
    """ETEGRec: semantic IDs, their tokenizer, and how the two are trained in turn. --epochs are the recommender's."""

    semantic_ids: Path | None = None
    """The folder that `python -m efficientids tokenize` made. Default: a tokenizer is pretrained on co-occurrence
    vectors of the training histories at the start."""
    levels: str | None = None
    """Codes of each level of the tokenizer; without --semantic_ids. Default: 256,256,256; below 1,024 items thrice the
    largest power of two that is at most a quarter of them, so that a code starts from four items or more."""
    pretrain_epochs: int = 100
    """Of the tokenizer alone, before all else; without --semantic_ids."""
    suffix_size: int = 256
    """Codes of the level that tells items with equal codes apart; without --semantic_ids."""
    code_dim: int = 128
    """Width of a code's vector, of the tokenizer's latents, too."""
    tie_to_tokenizer: bool = False
    """The recommender's code tables are the tokenizer's codebooks, and not copies of them at the start."""
    residual_grad: Literal["straight_through", "passthrough"] = "straight_through"
    """Whether deeper levels of the quantiser give the latents a gradient (passthrough) or not."""
    tokenizer_epochs: float = 1.0
    """Of the tokenizer's turn, before each turn of the recommender; 0: no alternation."""
    recommender_epochs: float = 1.0
    """Of the recommender's turn; --epochs and --num_steps are rounded to whole turns. Without the tokenizer's turns and
    tied tables there is one turn, of all epochs."""
    aligned_from: float | None = None
    """Epochs of the recommender without alignment losses. Default: 10, or a quarter of --epochs if that is less."""
    code_loss: float = 1.0
    """Weight of the codes' cross-entropy."""
    kl_loss: float = 1e-4
    """Weight of sequence-item alignment."""
    dec_cl_loss: float = 3e-4
    """Weight of preference-semantic alignment; its negatives are the other items that a micro-batch, on all devices,
    is asked for."""
    sia_sign: Literal["paper", "released"] = "paper"
    """Softmax over negative distances, or over distances as the released code has it."""
    targets: Literal["all", "last"] = "all"
    """Learn every item of a history from those before it, or a target alone (the official loss): the last item of one
    beginning of the history, drawn anew at every step."""
    tokenizer_learning_rate: float = 1e-4
    """Peak, in its turns, where it has any."""
    finetune_epochs: float | None = None
    """Then, from the best checkpoint: codes alone, tokenizer fixed. Default: a fifth of --epochs."""
    finetune_learning_rate: float = 5e-4
    """Peak, in --finetune_epochs, where there are any."""
    beams: int = 20
    """Of the search; more where more results are asked for."""
    normalise: Literal["alphabet", "children"] = "alphabet"
    """Train and score codes among all of their level, or among those that lead to an item."""
    prompt: str | None = None
    """Text around the history's codes, as in 'Bought: {history} Next:'; needs --tokenizer or weights with one.
    Default: codes alone."""


@dataclasses.dataclass(frozen=True)
class TrainConfig(
    ItemKNNOptions, SASRecOptions, SemanticIDOptions, ItemOptions, TrainingOptions, LlamaOptions, PlanOptions,
    RunOptions,
):  # fmt: skip
    """Trains a recommender with a Llama inside. Without a flag: a tiny Llama on a generated catalogue of films."""


def _names(options: type) -> frozenset[str]:
    return frozenset(field.name for field in dataclasses.fields(options))


_COUNTED = frozenset({"recommender", "data_dir", "checkpoint_dir", "trackers"}) | _names(PlanOptions)
_TRAINED = _names(RunOptions) | _names(PlanOptions) | _names(TrainingOptions)
READS: Mapping[str, frozenset[str]] = {
    "efficientids": _TRAINED | _names(LlamaOptions) | _names(ItemOptions),
    "etegrec": _TRAINED - {"pack_sequences", "seq_len"}
    | _names(LlamaOptions)
    | _names(SemanticIDOptions)
    | {"tokenizer"},
    "sasrec": _TRAINED - {"max_seq_len", "pack_sequences"} | _names(SASRecOptions),
    "item_knn": _COUNTED | _names(ItemKNNOptions) | {"seq_len"},
    "popularity": _COUNTED,
}
"""The flags that each recommender looks at: any other one is refused with it, so that no flag does nothing."""
