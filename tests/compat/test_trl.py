"""TRL: without its patch, each step that is left out is still taken; and its counts of FLOPs."""

import datasets
import pytest
import torch
import trl.trainer.dpo_trainer
import trl.trainer.utils
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.kernels.chunked_logprob import _use_triton
from trl.trainer.utils import add_fused_lm_head, hash_module

from reprotune.compat.trl import (
    CachedReferenceTrainer,
    adapter_dtype_kept,
    drop_frozen_copy,
    flops_per_token,
    head_log_probs,
    known_devices,
    peak_flops,
    resume_token_count,
    score_only_labelled_tokens,
    skip_hashing_the_model,
)
from reprotune.model import loading
from tests.conftest import changed
from tests.tiny import make_policy

PAIRS = datasets.Dataset.from_dict(
    {
        "prompt_ids": [[5, 6, 7], [8, 9]],
        "chosen_ids": [[10, 11], [12, 13, 14]],
        "rejected_ids": [[15], [16, 17]],
        "ref_chosen_logps": [-1.25, -2.5],
        "ref_rejected_logps": [-3.75, -5.0],
    }
)


@pytest.fixture(autouse=True)
def trl_unpatched(monkeypatch):
    """TRL as it comes; what a test patches is undone."""
    monkeypatch.setattr(trl.trainer.utils, "_use_triton", _use_triton)
    monkeypatch.setattr(trl.trainer.dpo_trainer, "hash_module", hash_module)


def adapted(policy: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    return get_peft_model(policy, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))


def dpo(trainer_class, policy, tokenizer, folder):
    config = DPOConfig(
        output_dir=str(folder),
        precompute_ref_log_probs=True,
        max_length=None,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
    )
    return trainer_class(policy, args=config, train_dataset=PAIRS, processing_class=tokenizer)


def test_the_head_scores_all_tokens_unless_told_otherwise():
    model = make_policy("qwen3", "sdpa")
    add_fused_lm_head(model)
    ids = torch.arange(5, 25)[None]
    labels = torch.full_like(ids, -100)
    labels[0, 7:10] = ids[0, 7:10]

    def scored() -> tuple[torch.Tensor, int]:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            log_probs = model(ids, labels=labels, fused_lm_head=True).log_probs
        return log_probs, counter.get_total_flops()

    expected, all_tokens = scored()
    score_only_labelled_tokens()
    log_probs, labelled_tokens = scored()
    torch.testing.assert_close(log_probs, expected)
    unlabelled = ids.shape[1] - 1 - 3
    assert all_tokens - labelled_tokens == 2 * unlabelled * model.lm_head.weight.numel()


def test_a_dpo_trainer_hashes_the_model_unless_told_otherwise(tokenizer, tmp_path):
    hashed = dpo(CachedReferenceTrainer, make_policy("qwen3", "sdpa"), tokenizer, tmp_path)
    assert len(hashed._precompute_model_hash) == 64
    skip_hashing_the_model()
    skipped = dpo(CachedReferenceTrainer, make_policy("qwen3", "sdpa"), tokenizer, tmp_path)
    assert skipped._precompute_model_hash is None


def test_a_dpo_trainer_takes_tokens_and_reference_only_if_told(tokenizer, tmp_path):
    with pytest.raises(KeyError, match="chosen"):
        dpo(DPOTrainer, make_policy("qwen3", "sdpa"), tokenizer, tmp_path)

    class WithoutCache(DPOTrainer):
        _prepare_dataset = CachedReferenceTrainer._prepare_dataset

    with pytest.raises(ValueError, match=r"ref_chosen_logps.*duplicated"):
        dpo(WithoutCache, make_policy("qwen3", "sdpa"), tokenizer, tmp_path)
    trainer = dpo(CachedReferenceTrainer, make_policy("qwen3", "sdpa"), tokenizer, tmp_path)
    assert trainer.train_dataset.to_list() == PAIRS.to_list()
    batch = next(iter(trainer.get_train_dataloader()))
    assert sorted(batch["ref_chosen_logps"].tolist()) == [-2.5, -1.25]


def test_a_dpo_trainer_copies_the_adapter(tokenizer, tmp_path):
    policy = adapted(make_policy("qwen3", "sdpa"))
    dpo(CachedReferenceTrainer, policy, tokenizer, tmp_path)
    assert set(policy.peft_config) == {"default", "ref"}
    drop_frozen_copy(policy)
    assert set(policy.peft_config) == {"default"}
    assert not [name for name, _ in policy.named_parameters() if ".ref." in name]
    drop_frozen_copy(make_policy("qwen3", "sdpa"))


@pytest.mark.parametrize("kept", [False, True])
def test_a_trainer_rounds_an_adapter_on_a_quantized_base_unless_told_otherwise(
    kept, settings, model, tokenizer, tmp_path
):
    quantized = changed(settings, {"model.quantization": "nf4"}).model
    policy = adapted(loading.load_base(model, quantized))
    before = {name: weight.clone() for name, weight in policy.named_parameters() if weight.requires_grad}
    if kept:
        with adapter_dtype_kept(policy):
            dpo(CachedReferenceTrainer, policy, tokenizer, tmp_path)
    else:
        dpo(CachedReferenceTrainer, policy, tokenizer, tmp_path)
    after = {name: weight for name, weight in policy.named_parameters() if name in before}
    assert {weight.dtype for weight in before.values()} == {torch.float32}
    assert {weight.dtype for weight in after.values()} == {torch.float32 if kept else torch.bfloat16}
    assert not kept or all(torch.equal(after[name], weight) for name, weight in before.items())


def test_a_resumed_trainer_counts_tokens_from_zero_unless_told_otherwise(tokenizer, tmp_path):
    rows = datasets.Dataset.from_dict(
        {"input_ids": [[5, 6, 7], [8, 9, 10, 11]], "labels": [[5, 6, 7], [8, 9, 10, 11]]}
    )

    def trainer(**settings) -> SFTTrainer:
        config = SFTConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            save_steps=1,
            logging_steps=1,
            per_device_train_batch_size=1,
            train_sampling_strategy="sequential",
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
            padding_free=True,
            bf16=False,
            use_cpu=True,
            report_to="none",
            **settings,
        )
        return SFTTrainer(
            make_policy("qwen3", "sdpa"), config, train_dataset=rows, processing_class=tokenizer
        )

    def counts(trained: SFTTrainer) -> list[float]:
        return [entry["num_tokens"] for entry in trained.state.log_history if "num_tokens" in entry]

    whole = trainer()
    whole.train()
    assert counts(whole) == [3, 7]
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert counts(resumed) == [3, 4], "TRL continues the count by itself"
    told = trainer()
    resume_token_count(told, whole.state.log_history[:1])
    told.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert counts(told) == [3, 7]


def test_log_probs_of_the_head_are_those_of_the_model():
    model = make_policy("qwen3", "sdpa")
    add_fused_lm_head(model)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = model(ids, labels=ids, fused_lm_head=True).log_probs[0]
        hidden = model.model(ids).last_hidden_state[0, :-1]
        log_probs = head_log_probs(hidden, model.lm_head, ids[0, 1:])
        stock = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    assert torch.equal(log_probs, expected)
    torch.testing.assert_close(log_probs, stock)


def test_flops_of_a_training_step_are_about_six_per_weight():
    """Two per weight in the forward pass and four in the backward pass; little of it is attention here."""
    model = make_policy("qwen3", "sdpa")
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert flops_per_token(model.config, 8) == pytest.approx(6 * weights, rel=0.05)
    assert flops_per_token(MixtralConfig(), 8) is None, "TRL can count Mixtral now"


def test_peak_flops_are_those_of_the_data_sheet():
    """https://www.nvidia.com/en-us/data-center/h100/: 989 TFLOP/s in bfloat16 without sparsity."""
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == pytest.approx(989e12, rel=0.001)
    assert peak_flops("a GPU of tomorrow", "bfloat16") is None
    devices = known_devices("bfloat16")
    assert "h100" in devices and devices == sorted(set(devices))
    assert all(peak_flops(name.replace("-", " "), "bfloat16") for name in devices)
