"""A tiny world for tests: a random 2-layer model, its tokenizer, training rows and benchmarks.

python -m tests.tiny FOLDER      write model, data, benchmarks and params.yaml under FOLDER/tiny
"""

import json
import sys
from pathlib import Path

from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
WORDS = (
    "red blue green one two three four big small cat dog bird tree house "
    "runs sings sleeps jumps the a and is was"
).split()


def make_tokenizer(folder: Path) -> None:
    """Byte-level BPE with Qwen's special tokens: <|endoftext|> ends a sequence, <|im_end|> a turn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS), *WORDS], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    ).save_pretrained(folder)


def make_model(folder: Path, hidden: int = 64, layers: int = 2, architecture: str = "qwen3") -> Path:
    """Random weights, the same on every call."""
    from transformers import AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(folder)
    make_policy(
        architecture, None, len(AutoTokenizer.from_pretrained(folder)), hidden, layers
    ).save_pretrained(folder)
    return folder


def make_policy(
    architecture: str,
    attention: str | None,
    vocabulary: int = 300,
    hidden: int = 64,
    layers: int = 2,
    window: int | None = None,
):
    """A small random model with the architecture qwen3, llama or gemma3.

    With `window`, its first layer attends to a sliding window of that many tokens.
    """
    import torch
    from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen3Config

    config = {"qwen3": Qwen3Config, "llama": LlamaConfig, "gemma3": Gemma3TextConfig}[architecture](
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
        **(
            {}
            if window is None
            else {
                "sliding_window": window,
                "layer_types": ["sliding_attention", *["full_attention"] * (layers - 1)],
            }
        ),
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def sentence(number: int) -> str:
    return " ".join(WORDS[(number * 7 + step * step * 3) % len(WORDS)] for step in range(3 + number % 4))


def alpaca_rows(count: int = 40) -> list[dict]:
    return [
        {
            "instruction": f"say {sentence(n)} {n}",
            "input": "now" if n % 3 == 0 else "",
            "output": sentence(n + 1),
        }
        for n in range(count)
    ]


def preference_rows(count: int = 24) -> list[dict]:
    return [
        {
            "conversations": [{"from": "human", "value": f"tell {sentence(n)} {n}"}],
            "chosen": {"from": "gpt", "value": sentence(n + 2)},
            "rejected": {"from": "gpt", "value": f"{sentence(n + 5)} {WORDS[n % 7]}"},
        }
        for n in range(count)
    ]


def benchmark_rows(count: int = 12) -> dict[str, tuple[str, list[dict]]]:
    """The split and the rows of each benchmark, with the columns they have on the Hub."""
    numbers = range(count)
    return {
        "arc_challenge": (
            "test",
            [
                {
                    "id": f"q{n}",
                    "question": f"which {sentence(n)}?",
                    "choices": {"text": [sentence(n + k) for k in range(4)], "label": list("ABCD")},
                    "answerKey": "ABCD"[n % 4],
                }
                for n in numbers
            ],
        ),
        "commonsense_qa": (
            "validation",
            [
                {
                    "id": f"q{n}",
                    "question": f"where {sentence(n)}?",
                    "question_concept": "cat",
                    "choices": {"label": list("ABCDE"), "text": [sentence(n + k) for k in range(5)]},
                    "answerKey": "ABCDE"[n % 5],
                }
                for n in numbers
            ],
        ),
        "gsm8k": (
            "test",
            [
                {"question": f"{n} and one?", "answer": f"it is {n} + 1 = {n + 1}\n#### {n + 1}"}
                for n in numbers
            ],
        ),
        "hellaswag": (
            "validation",
            [
                {
                    "ind": n,
                    "activity_label": "cat",
                    "ctx_a": sentence(n),
                    "ctx_b": "the dog",
                    "ctx": sentence(n) + " the dog",
                    "endings": [sentence(n + k) for k in range(4)],
                    "source_id": f"s{n}",
                    "split": "val",
                    "split_type": "indomain",
                    "label": str(n % 4),
                }
                for n in numbers
            ],
        ),
        "winogrande": (
            "validation",
            [
                {
                    "sentence": f"the cat saw the dog and _ {sentence(n)}.",
                    "option1": "the cat",
                    "option2": "the dog",
                    "answer": "12"[n % 2],
                }
                for n in numbers
            ],
        ),
    }


def make_world(folder: Path, architecture: str = "qwen3") -> None:
    """Write model, data and benchmarks to `folder/tiny`, and a `folder/params.yaml` that uses them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tiny = folder / "tiny"
    make_model(tiny / "model", architecture=architecture)
    (tiny / "alpaca.json").write_text(json.dumps(alpaca_rows()))
    (tiny / "preferences.json").write_text(json.dumps(preference_rows()))
    for name, (split, rows) in benchmark_rows().items():
        (tiny / "benchmarks" / name).mkdir(parents=True, exist_ok=True)
        pq.write_table(
            pa.Table.from_pylist(rows), tiny / "benchmarks" / name / f"{split}-00000-of-00001.parquet"
        )
    with (folder / "params.yaml").open("w") as file:
        YAML().dump(tiny_params(folder), file)


def local(path: Path, root: Path) -> dict[str, str]:
    """The `source` entry of params.yaml for a path below `root`."""
    from reprotune.data.sources import local_sha256

    return {"kind": "local", "path": str(path.relative_to(root)), "sha256": local_sha256(path)}


def tiny_params(folder: Path) -> dict:
    """The committed params.yaml with sources under `folder` and small sizes."""
    tiny = folder / "tiny"
    content = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text())
    content["model"]["source"] = local(tiny / "model", folder)
    for data, name, row_format, file in (
        ("sft", "rows", "alpaca", "alpaca.json"),
        ("preferences", "pairs", "sharegpt", "preferences.json"),
    ):
        source = {"format": row_format, "ignore": [], "source": local(tiny / file, folder)}
        content["data"][data] |= {"sources": {name: source}, "mix": {name: {"limit": None, "weight": 1.0}}}
    content["tokenize"]["sft"] |= {
        "held_out": 6,
        "max_length": 128,
        "max_dropped": 0.0,
        "deduplicate": {"exact": True, "near": None},
    }
    content["tokenize"]["dpo"] |= {
        "held_out": 4,
        "max_length": 128,
        "max_dropped": 0.0,
        "deduplicate": {"exact": True, "near": None},
    }
    content["lora"] |= {"r": 4, "alpha": 8}
    content["sft"] |= {"epochs": 1.0, "global_batch_size": 2, "micro_batch_size": 1}
    content["dpo"] |= {"steps": 3, "global_batch_size": 4, "micro_batch_size": 2}
    for name, benchmark in content["benchmarks"].items():
        benchmark |= {"source": local(tiny / "benchmarks" / name, folder), "format": "hub", "limit": 6}
        if benchmark["max_new_tokens"] is not None:
            benchmark["max_new_tokens"] = 8
    # random weights make many tokens about equally likely
    content["merge"]["min_agreement"] = 0.5
    content["report"]["licences"] |= {"sft": {"rows": "CC0-1.0"}, "preferences": {}}
    return content


if __name__ == "__main__":
    make_world(Path(sys.argv[1]))
