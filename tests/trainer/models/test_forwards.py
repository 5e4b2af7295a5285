"""Checkpoints: both formats of a scorer, strictly, and what a model is made of once loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from storages import Made
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GraniteConfig,
)

from hlrlhf.trainer import formulas
from hlrlhf.trainer.errors import TrainerError
from hlrlhf.trainer.models import forwards, loading, roles, tokenizers

ROWS = [[1, 5, 6, 7, 8, 9, 2], [1, 30, 2], [1, 11, 12, 2]]

architectures = pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)


def scores(scorer: forwards.Scorer, width: int = 1) -> Any:
    with torch.no_grad():
        return scorer(*tiny.padded(ROWS), width)


def bin_to_safetensors(folder: Path) -> None:
    source = folder / "pytorch_model.bin"
    save_file(torch.load(source, weights_only=True), folder / "model.safetensors")
    source.unlink()


def shard(folder: Path) -> None:
    """Split a folder's one file of weights in two, with an index."""
    (source,) = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    safe = source.suffix == ".safetensors"
    weights = load_file(source) if safe else torch.load(source, weights_only=True)
    names = sorted(weights)
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        name = f"{source.stem}-{number:05}-of-00002{source.suffix}"
        some = {key: weights[key] for key in part}
        save_file(some, folder / name, {"format": "pt"}) if safe else torch.save(
            some, folder / name
        )
        index |= dict.fromkeys(part, name)
    source.unlink()
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / f"{source.name}.index.json").write_text(text)


def change(folder: Path, edit: Any) -> None:
    """Edit the weights of a folder that holds a pytorch_model.bin."""
    source = folder / "pytorch_model.bin"
    weights = torch.load(source, weights_only=True)
    edit(weights)
    torch.save(weights, source)


# 1. Formats.


@architectures
def test_both_formats_of_a_scorer_give_equal_scores(tmp_path: Path, architecture: str) -> None:
    hf = loading.load_scorer(
        str(tiny.save_classifier(tmp_path / "hf", architecture)), "fp32", 0.0
    ).eval()
    expected = scores(hf, 2)
    assert len(set(expected.flatten().tolist())) == expected.numel()

    for prepare in (None, bin_to_safetensors, shard):
        folder = tiny.save_step2(tmp_path / f"step2-{prepare}", architecture)
        if prepare is not None:
            prepare(folder)
        step2 = loading.load_scorer(str(folder), "fp32", 0.0).eval()
        torch.testing.assert_close(scores(step2, 2), expected)


@architectures
def test_sharded_folders_of_hugging_face(tmp_path: Path, architecture: str) -> None:
    whole = loading.load_scorer(
        str(tiny.save_classifier(tmp_path / "hf", architecture)), "fp32", 0.0
    ).eval()
    shard(tmp_path / "hf")

    sharded = loading.load_scorer(str(tmp_path / "hf"), "fp32", 0.0).eval()

    torch.testing.assert_close(scores(sharded), scores(whole))


@architectures
def test_a_scorer_says_what_the_plain_classifier_says(tmp_path: Path, architecture: str) -> None:
    folder = tiny.save_classifier(tmp_path / "hf", architecture)
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    # Rows come one by one: without a padding token it reads each one's last.
    plain.config.pad_token_id = None

    found = scores(loading.load_scorer(str(folder), "fp32", 0.0).eval())[:, -1]

    with torch.no_grad():
        expected = [float(plain(torch.tensor([row])).logits) for row in ROWS]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("dtype", "expected"), list(loading.DTYPES.items()))
def test_precision(tmp_path: Path, dtype: str, expected: torch.dtype) -> None:
    loaded = [
        loading.load_policy(str(tiny.save_policy(tmp_path / "actor", "llama")), dtype, 0.0),
        loading.load_scorer(str(tiny.save_classifier(tmp_path / "hf", "llama")), dtype, 0.0),
        loading.load_scorer(str(tiny.save_step2(tmp_path / "step2", "llama")), dtype, 0.0),
    ]

    for model in loaded:
        assert {parameter.dtype for parameter in model.parameters()} == {expected}
    # What leaves a model is fp32 all the same.
    assert scores(loaded[1]).dtype == torch.float32
    ids, mask = tiny.padded(ROWS)
    assert loaded[0](ids, mask, 1, 1.0).dtype == torch.float32


def test_scalars_are_made_in_fp32_of_bf16_states(tmp_path: Path) -> None:
    scorer = loading.load_scorer(str(tiny.save_classifier(tmp_path, "llama")), "bf16", 0.0).eval()
    states: list[Any] = []
    scorer.head.register_forward_hook(lambda _, inputs, __: states.append(inputs[0]))

    found = scores(scorer, 2)

    (hidden,) = states
    assert hidden.dtype == torch.bfloat16
    expected = (hidden.double() @ scorer.head.weight.double().T).squeeze(-1)
    # Of products of 8-bit numbers; fp32 rounds their sum of 32 in 2^-24 each. bf16 would in 2^-9.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=32 * 2**-24 * 64)
    assert (found != found.bfloat16()).any()


# 2. Strictness.


@architectures
@pytest.mark.parametrize("kind", ["hf", "step2"])
def test_a_missing_weight_is_named(tmp_path: Path, architecture: str, kind: str) -> None:
    save = tiny.save_classifier if kind == "hf" else tiny.save_step2
    folder = save(tmp_path / "model", architecture)
    if kind == "hf":
        source = folder / "model.safetensors"
        weights = load_file(source)
        del weights["score.weight"]
        save_file(weights, source, {"format": "pt"})
        lost = "score.weight"
    else:
        prefix = "layers.1" if architecture == "llama" else "h.1"
        lost = f"{prefix}.input_layernorm.weight"
        change(folder, lambda weights: weights.pop(f"rwtransformer.{lost}"))

    with pytest.raises(TrainerError, match=rf"{folder}: .*lacks .*{lost}"):
        loading.load_scorer(str(folder), "fp32", 0.0)


def test_a_critic_with_other_names_is_refused_rather_than_random(tmp_path: Path) -> None:
    folder = tiny.save_step2(tmp_path / "model", "llama")

    def rename(weights: dict[str, Any]) -> None:
        for name in [name for name in weights if name != "v_head.weight"]:
            weights[name.replace("rwtransformer", "backbone")] = weights.pop(name)

    change(folder, rename)

    with pytest.raises(
        TrainerError, match=r"lacks model\.embed_tokens.* and \d+ more; it has back"
    ):
        loading.load_scorer(str(folder), "fp32", 0.0)


def test_a_weight_too_many_is_refused(tmp_path: Path) -> None:
    step2 = tiny.save_step2(tmp_path / "step2", "llama")
    change(step2, lambda weights: weights.update({"rwtransformer.extra": torch.ones(1)}))
    with pytest.raises(TrainerError, match=r"it has model\.extra, which the model has not"):
        loading.load_scorer(str(step2), "fp32", 0.0)

    policy = tiny.save_policy(tmp_path / "actor", "llama")
    weights = load_file(policy / "model.safetensors") | {"model.extra": torch.ones(1)}
    save_file(weights, policy / "model.safetensors", {"format": "pt"})
    with pytest.raises(TrainerError, match=r"it has model\.extra, which the model has not"):
        loading.load_policy(str(policy), "fp32", 0.0)


def test_buffers_that_a_model_computes_are_no_weights(tmp_path: Path) -> None:
    folder = tiny.save_step2(tmp_path / "model", "llama")
    expected = scores(loading.load_scorer(str(folder), "fp32", 0.0).eval())
    buffer = "rwtransformer.layers.0.self_attn.rotary_emb.inv_freq"
    change(folder, lambda weights: weights.update({buffer: torch.ones(4)}))

    found = scores(loading.load_scorer(str(folder), "fp32", 0.0).eval())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["policy", "hf", "step2"])
def test_weights_of_another_size_are_refused(tmp_path: Path, kind: str) -> None:
    save = {
        "policy": tiny.save_policy,
        "hf": tiny.save_classifier,
        "step2": tiny.save_step2,
    }[kind]
    folder = save(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    load = loading.load_policy if kind == "policy" else loading.load_scorer

    with pytest.raises(TrainerError, match=f"{folder}: "):
        load(str(folder), "fp32", 0.0)


def test_a_folder_without_weights_or_without_configuration(tmp_path: Path) -> None:
    for name, suffix in (("hf", "safetensors"), ("step2", "bin")):
        folder = (tiny.save_classifier if name == "hf" else tiny.save_step2)(
            tmp_path / name, "llama"
        )
        (weights,) = folder.glob(f"*.{suffix}")
        kept = weights.rename(tmp_path / "kept")
        with pytest.raises(TrainerError, match=r"model.safetensors,? n?or pytorch_model.bin"):
            loading.load_scorer(str(folder), "fp32", 0.0)
        kept.rename(weights)
        (folder / "config.json").unlink()
        with pytest.raises(TrainerError, match=f"{folder}: "):
            loading.load_scorer(str(folder), "fp32", 0.0)
    with pytest.raises(TrainerError, match="no causal language model"):
        loading.load_policy(str(tmp_path), "fp32", 0.0)
    with pytest.raises(TrainerError, match="holds no whole tokenizer"):
        tokenizers.load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("text", ["", "{}", '{"weight_map": {"v_head.weight": "gone.bin"}}'])
def test_a_broken_index_is_refused(tmp_path: Path, text: str) -> None:
    folder = tiny.save_step2(tmp_path / "model", "llama")
    shard(folder)
    (folder / "pytorch_model.bin.index.json").write_text(text)

    with pytest.raises(TrainerError, match=f"{folder}"):
        loading.load_scorer(str(folder), "fp32", 0.0)


class Trap:
    """An object whose unpickling runs a program."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_a_program_is_refused(tmp_path: Path) -> None:
    folder = tiny.save_step2(tmp_path / "model", "llama")
    sprung = tmp_path / "sprung"
    change(folder, lambda weights: weights.update({"v_head.weight": Trap(sprung)}))

    with pytest.raises(TrainerError, match=r"pytorch_model\.bin: cannot be read"):
        loading.load_scorer(str(folder), "fp32", 0.0)

    assert not sprung.exists()


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    folder = tiny.save_classifier(tmp_path / "hf", "llama")
    source = folder / "model.safetensors"
    source.write_bytes(source.read_bytes()[:1000])

    with pytest.raises(TrainerError, match=f"{folder}: .* header"):
        loading.load_scorer(str(folder), "fp32", 0.0)


# 3. Dropout.


def dropouts(model: nn.Module) -> set[float]:
    rates = {module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    for module in model.modules():
        for name in ("attention_dropout", "hidden_dropout"):
            rate = getattr(module, name, None)
            if isinstance(rate, float):
                rates.add(rate)
    return rates


@architectures
@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_dropout_is_the_settings_and_not_the_checkpoints(
    tmp_path: Path, architecture: str, rate: float
) -> None:
    loaded = [
        loading.load_policy(str(tiny.save_policy(tmp_path / "actor", architecture)), "fp32", rate),
        loading.load_scorer(str(tiny.save_classifier(tmp_path / "hf", architecture)), "fp32", rate),
        loading.load_scorer(str(tiny.save_step2(tmp_path / "step2", architecture)), "fp32", rate),
    ]

    ids, mask = tiny.padded(ROWS)
    for model in loaded:
        assert dropouts(model) == {rate}
        arguments = (ids, mask, 2, 1.0)[: 4 if isinstance(model, forwards.Policy) else 3]
        model.train()
        torch.manual_seed(0)
        first, second = model(*arguments), model(*arguments)
        model.eval()
        calm = model(*arguments)
        if rate:
            assert not first.equal(second)
        else:
            assert first.equal(second)
            assert first.equal(calm)


# 4. Padding on the left.


@pytest.mark.parametrize("architecture", tiny.WITH_POSITIONS)
def test_padding_on_the_left_does_not_show(tmp_path: Path, architecture: str) -> None:
    """Tolerance 1e-4: fp32 sums in another order."""
    folder = tiny.save_policy(tmp_path / "actor", architecture)
    policy = loading.load_policy(str(folder), "fp32", 0.0).eval()
    scorer = loading.load_scorer(
        str(tiny.save_classifier(tmp_path / "hf", architecture)), "fp32", 0.0
    ).eval()
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids, mask = tiny.padded(ROWS, width=12)

    with torch.no_grad():
        together, values = policy(ids, mask, 2, 1.0), scorer(ids, mask, 2)
        # A policy scores answer tokens; a scorer the token before them too.
        assert together.shape == (3, 2)
        assert values.shape == (3, 3)
        for i, row in enumerate(ROWS):
            alone = torch.tensor([row])
            logprobs = plain(alone).logits[0].log_softmax(-1)
            expected = [float(logprobs[t - 1, row[t]]) for t in (-2, -1)]
            assert together[i].tolist() == pytest.approx(expected, abs=1e-4)
            unpadded = scorer(alone, torch.ones_like(alone), 2)[0]
            assert values[i].tolist() == pytest.approx(unpadded.tolist(), abs=1e-4)


@pytest.mark.knob("ppo.logprob_chunk")
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("chunk", [1, 3, 5, 8])
def test_log_probs_in_chunks(tmp_path: Path, architecture: str, chunk: int) -> None:
    folder = str(tiny.save_policy(tmp_path, architecture))
    whole, chunked = (
        loading.load_policy(folder, "fp32", 0.0),
        loading.load_policy(folder, "fp32", 0.0, chunk),
    )
    ids, mask = tiny.padded([[1, 5, 6, 7, 8, 9, 10], [1, 30, 31, 4, 5, 6]])
    widths = []
    chunked.lm.get_output_embeddings().register_forward_hook(
        lambda _, inputs, __: widths.append(inputs[0].shape[1])
    )

    expected, found = (policy(ids, mask, 5, 0.7) for policy in (whole, chunked))
    for logprobs in (expected, found):
        (logprobs * torch.arange(10.0).view(2, 5)).sum().backward()

    # The logits of no more tokens are ever there, those of the backward pass included.
    assert max(widths) == min(chunk, 5)
    assert sum(widths) == 2 * 5
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(chunked.parameters(), whole.parameters(), strict=True):
        # Of a gradient's norm, after a hundred operations of 2^-24 each.
        difference = float((one.grad - other.grad).norm() / other.grad.norm())
        assert difference == pytest.approx(0, abs=2e-5)


def test_logits_that_are_changed_after_the_head_are_not_computed_in_chunks(tmp_path: Path) -> None:
    config = GraniteConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        logits_scaling=8.0,
        initializer_range=0.4,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)

    loading.load_policy(str(tmp_path), "fp32", 0.0)
    with pytest.raises(TrainerError, match="HL_PPO_LOGPROB_CHUNK=0"):
        loading.load_policy(str(tmp_path), "fp32", 0.0, 4)


# 5. Memory, in a model whose logits are larger than all else.


@pytest.fixture
def large_logits(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Options of such a model, sequences with a prompt of 3, and how large the logits are."""
    monkeypatch.setattr(formulas, "BLOCK", 4096)
    tokens = torch.randint(3, 512, (2, 63), generator=torch.Generator().manual_seed(1))
    return {"vocabulary": 512}, (tokens, torch.ones_like(tokens), 60, 0.7), 2 * 60 * 512


@architectures
def test_an_update_makes_logits_once_and_nothing_else_of_their_size(
    tmp_path: Path, architecture: str, large_logits: Any
) -> None:
    options, inputs, size = large_logits
    folder = tiny.save_policy(tmp_path, architecture, **options)
    policy = loading.load_policy(str(folder), "fp32", 0.0)

    with Made() as made:
        policy(*inputs).sum().backward()

    assert [each for each in made.sizes if each >= size] == [size]


def weighed(logprobs: Any, columns: slice) -> Any:
    """A loss that is another one for each column and not linear; and how many tokens it saw."""
    weights = torch.arange(1.0, 61)[columns] / 60 - 0.3
    return torch.stack([(weights * logprobs.exp()).sum(), torch.tensor(float(logprobs.numel()))])


# One whose head is its embedding, one with a head of its own, one whose head has a bias.
HEADS = ("bloom", "llama", "phi")


def taught(folder: Path, chunk: int, frozen: bool, dtype: str, inputs: Any) -> tuple[Any, Any]:
    """What a loss says of a policy's answers, and its gradient, weight by weight."""
    policy = loading.load_policy(str(folder), dtype, 0.0, chunk)
    policy.lm.get_output_embeddings().requires_grad_(not frozen)
    loss, seen = policy(*inputs, weighed)
    (3 * loss).backward()
    assert seen == 2 * 60
    return loss.item(), {
        name: parameter.grad
        for name, parameter in policy.named_parameters()
        if parameter.requires_grad
    }


@pytest.mark.knob("ppo.logprob_chunk")
@pytest.mark.parametrize("architecture", HEADS)
@pytest.mark.parametrize(("chunk", "frozen"), [(7, False), (60, False), (99, False), (7, True)])
def test_a_loss_in_chunks_has_the_gradient_of_one_at_once(
    tmp_path: Path, architecture: str, chunk: int, frozen: bool, large_logits: Any
) -> None:
    options, inputs, _ = large_logits
    folder = tiny.save_policy(tmp_path, architecture, **options)

    loss, expected = taught(folder, 0, frozen, "fp32", inputs)
    same, found = taught(folder, chunk, frozen, "fp32", inputs)

    assert same == pytest.approx(loss, rel=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # Of a gradient's norm, after a hundred operations of 2^-24 each.
        difference = float((found[name] - gradient).norm() / gradient.norm())
        assert difference == pytest.approx(0, abs=2e-5), name


def test_a_loss_in_chunks_in_bf16(tmp_path: Path, large_logits: Any) -> None:
    options, inputs, _ = large_logits
    folder = tiny.save_policy(tmp_path, "llama", **options)

    _, exact = taught(folder, 0, False, "fp32", inputs)
    _, whole = taught(folder, 0, False, "bf16", inputs)
    _, found = taught(folder, 7, False, "bf16", inputs)

    for name, gradient in exact.items():
        assert found[name].dtype == torch.bfloat16
        off, usual = (float((some[name] - gradient).norm()) for some in (found, whole))
        # Nine chunks are added up, the sum being rounded by 2^-8 each time.
        assert off < usual + 9 * 2**-8 * float(gradient.norm()), name


def added(_: Any, one: Any, other: Any, **options: Any) -> int:
    """Operations of a product that is added in place, by its shapes; torch counts the others."""
    return 2 * int(one[0] * one[1] * other[1])


@pytest.mark.parametrize("architecture", HEADS)
def test_a_loss_in_chunks_takes_no_more_products_and_holds_the_logits_of_a_chunk(
    tmp_path: Path, architecture: str, large_logits: Any
) -> None:
    options, inputs, size = large_logits
    folder = str(tiny.save_policy(tmp_path, architecture, **options))
    products = []
    for chunk in (0, 15):
        policy = loading.load_policy(folder, "fp32", 0.0, chunk)
        counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added})
        with counter:
            policy(*inputs, weighed)[0].backward()
        products.append(counter.get_total_flops())
    with Made() as training:
        policy(*inputs, weighed)[0].backward()
    with Made() as scoring, torch.no_grad():
        policy(*inputs)

    assert products[1] == products[0]
    for made in (training, scoring):
        assert max(made.sizes) < size
        assert made.sizes.count(size // 4) == 4


def test_the_gradient_of_a_loss_in_chunks_is_taken_once(tmp_path: Path, large_logits: Any) -> None:
    options, inputs, _ = large_logits
    folder = tiny.save_policy(tmp_path, "llama", **options)
    policy = loading.load_policy(str(folder), "fp32", 0.0, 15)
    loss, _ = policy(*inputs, weighed)

    loss.backward(retain_graph=True)

    with pytest.raises(RuntimeError, match="can be taken once"):
        loss.backward()


@pytest.mark.parametrize("chunk", [0, 2])
@pytest.mark.parametrize("architecture", ["bloom", "gpt2", "llama"])
def test_tied_embeddings_have_the_same_gradient_added_to_the_heads_row_by_row(
    tmp_path: Path, architecture: str, chunk: int
) -> None:
    folder = tiny.save_policy(tmp_path, architecture)
    gradients = []
    for sparsely in (False, True):
        policy = loading.load_policy(str(folder), "fp32", 0.0, chunk)
        embeddings = policy.lm.get_input_embeddings()
        if sparsely:
            roles.add_sparsely(policy)
            assert embeddings.sparse is (architecture != "llama"), "its head is apart"
        ids = torch.tensor([[1, 5, 6, 7], [1, 30, 5, 9]])
        for _ in range(2):  # added up over micro batches
            policy(ids, torch.ones_like(ids), 3, 1.0).sum().backward()
        gradients.append(embeddings.weight.grad)
    assert not gradients[1].is_sparse
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
