"""Names of weights in the configuration: what they mean, what is refused, and that frozen layers stay exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from chunkflow_cli.config.load import load
from chunkflow_cli.config.schema import LoraConfig, OptimConfig
from chunkflow_cli.config.weight_names import factor_of, is_named
from chunkflow_cli.errors import UsageError
from chunkflow_cli.execution.attention import function as attention
from chunkflow_cli.execution.attention.reference import ReferenceBackend
from chunkflow_cli.execution.parity import InChunks, compare, random_sequences
from chunkflow_cli.execution.stages import check_stages
from chunkflow_cli.model.adapters import add_lora
from chunkflow_cli.model.shape import model_shape, with_frozen
from chunkflow_cli.model.trained_weights import apply_to, freeze, layer_matrices
from chunkflow_cli.planning.stage_cut import cut_layers
from support.models import OWN_ATTENTION

pytestmark = pytest.mark.torch


def model_of(model_type: str = "qwen2", **settings: Any) -> Any:
    attention.register()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(
        model_type, **sizes, num_hidden_layers=4, vocab_size=61, initializer_range=0.2, pad_token_id=0, **settings
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation=attention.NAME).train()


@pytest.mark.parametrize(
    ("name", "is_meant"),
    [
        ("layers.1", True), ("embed_tokens", False), ("layers.10", False), ("mlp", True), ("up_proj.weight", True),
        ("ayers.1", False), ("layers", True), (r".*\.mlp\..*", True), (r".*\.mlp", False), ("layers.1.mlp.up", False),
    ],
)  # fmt: skip
def test_a_name_means_whole_parts_or_all_of_it(name: str, is_meant: bool) -> None:
    assert is_named("model.layers.1.mlp.up_proj.weight", name) is is_meant


def test_of_several_factors_the_last_counts() -> None:
    factors = {"layers": 0.5, "layers.0": 0.1, ".*norm.*": 2.0}
    names = ["model.layers.1.mlp.weight", "model.layers.0.mlp.weight", "model.layers.0.norm.weight", "lm_head.weight"]
    assert [factor_of(name, factors) for name in names] == [0.5, 0.1, 2.0, 1.0]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["optim.freeze=['(']"], "is not a regular expression"),
        (["optim.lr_factors={a: -1}"], "must be at least 0"),
        (["optim.min_lr_ratio=0.1", "optim.schedule=constant"], "has no effect with optim.schedule=constant"),
        (["optim.name=muon"], "set optim=muon"),
    ],
)
def test_keys_that_cannot_work_are_refused(words: list[str], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        load(["model.path=x", "data.path=x", *words])


def test_names_that_mean_nothing_are_refused() -> None:
    model = model_of()
    with pytest.raises(UsageError, match=r"optim\.freeze: 'layer\.0' matches no weight that is trained"):
        freeze(model, ["layers.1", "layer.0"])
    with pytest.raises(UsageError, match=r"optim\.lr_factors: 'layers\.2' matches no weight"):
        apply_to(model, OptimConfig(freeze=["layers.2", "lm_head"], lr_factors={"layers.2": 2.0}))
    with pytest.raises(UsageError, match=r"optim\.freeze leaves nothing to train"):
        freeze(model, ["model"])


def test_the_share_that_is_trained_is_stated() -> None:
    model = model_of(tie_word_embeddings=True)
    share = apply_to(model, OptimConfig(freeze=["lm_head"]))  # is the embedding, too
    tables = 61 * 32
    assert (share.weights - share.trained, share.weights) == (tables, sum(p.numel() for p in model.parameters()))
    assert str(share).startswith("optim.freeze: 94 % of the weights are trained")


@pytest.mark.parametrize(
    ("names", "untrained_stage"),
    [
        (["embed_tokens", "layers.0", "layers.1"], 0), (["layers.2", "layers.3", "norm", "lm_head"], 1),
        (["embed_tokens", "layers"], 0), ([r".*(q|k|v|o)_proj.*"], None), (["embed_tokens", "layers.0"], None),
    ],
)  # fmt: skip
def test_frozen_weights_leave_chunks_exact(names: list[str], untrained_stage: int | None) -> None:
    """Loss and gradients of what is left equal those of whole sequences, on one stage and on two."""
    model = model_of()
    freeze(model, names)
    sequences = random_sequences((100, 13, 1, 31), 61)
    assert compare(model, sequences, InChunks(ReferenceBackend(), chunk_size=24, k=1)).passed
    if untrained_stage is None:
        check_stages(model, cut_layers(4, 2))
        assert compare(model, sequences, InChunks(ReferenceBackend(), chunk_size=24, k=1, stages=2)).passed
    else:
        with pytest.raises(UsageError, match=rf"stage {untrained_stage} .* has nothing to train"):
            check_stages(model, cut_layers(4, 2))


@pytest.mark.parametrize(
    ("model_type", "settings", "matrices"),
    [
        ("qwen2", {"tie_word_embeddings": True}, 4 * 7),
        ("mixtral", {"num_local_experts": 2}, 4 * (4 + 1 + 2)),
        ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}, 2 * (2 + 3) + 2 * (4 + 3)),
        ("mamba", {"state_size": 4}, 4 * 4),
    ],
)  # fmt: skip
def test_muon_trains_the_matrices_of_the_layers(model_type: str, settings: dict[str, Any], matrices: int) -> None:
    """Not embeddings, heads, filters of convolutions or tables of states; experts count as one."""
    model = model_of(model_type, **settings)
    found = layer_matrices(model)
    assert len(found) == matrices
    assert not [
        name for name in found if "embed" in name or "lm_head" in name or "conv.conv" in name or "A_log" in name
    ]


def test_muon_trains_adapters() -> None:
    model = add_lora(model_of(), LoraConfig(enabled=True, r=2))
    assert len(layer_matrices(model)) == 4 * 7 * 2


def test_an_indexer_stays_as_it_is(tiny_model: Callable[..., Any]) -> None:
    """It has no gradient. Weight decay would shrink it, and plan would count its optimizer states."""
    kind, settings = OWN_ATTENTION["deepseek_v32, indexer"]
    model = tiny_model(kind, **settings)
    shape = with_frozen(model_shape(model), model, OptimConfig())
    frozen = {name: p.numel() for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    assert all(".indexer." in name for name in frozen)
    assert shape.trainable_parameters == shape.parameters - sum(frozen.values())
    adapted = add_lora(model, LoraConfig(enabled=True, target_modules=["wq_b", "wk"]))
    with pytest.raises(
        UsageError, match=r"^model\.lora\.target_modules names only parts of the indexer(.|\n)*other modules$"
    ):
        apply_to(adapted, OptimConfig())
