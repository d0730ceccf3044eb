"""Talk to a model of the run in the terminal, through the run's chat template and as the model is scored."""

import sys
from pathlib import Path

from transformers import PreTrainedTokenizerBase, TextStreamer

from reprotune import params, params_file
from reprotune.data.conversations import Turn
from reprotune.data.templates import load_tokenizer, template_file
from reprotune.errors import InputError
from reprotune.model import decoding, determinism, loading, policies
from reprotune.model.policies import Policy


def run(
    name: str, models: Path, max_new_tokens: int, temperature: float, templates: Path = Path("templates")
) -> None:
    """Load a model of the run and talk to it until an empty line."""
    if max_new_tokens < 1 or not 0 <= temperature < 100:
        raise InputError(
            f"found --max-new-tokens {max_new_tokens} and --temperature {temperature}, expected at least 1, "
            "and at least 0 and less than 100"
        )
    settings = params_file.load()
    determinism.start(settings.seed, warn_only=True)
    model = load(name, settings, models)
    tokenizer = load_tokenizer(models / "base", template_file(templates, models / "base", settings.model))
    policies.bare(model).generation_config = decoding.of_run(models / "base", tokenizer)
    print(f"{models / name}: an empty line ends the chat, /new starts a new one", file=sys.stderr)
    talk(model, tokenizer, max_new_tokens, temperature)


def load(name: str, settings: params.Params, models: Path) -> Policy:
    """A model by its folder's name: base, sft, dpo, or final, the merged one, which is not quantized.

    Raises:
        InputError: there is no such folder, or it cannot be loaded.
    """
    folder = models / name
    if not folder.exists():
        stage = "merge" if name == "final" else name
        raise InputError(
            f"{folder}: no such folder; `dvc repro {stage}` makes it, `dvc pull {folder}` fetches it"
        )
    if name == "base":
        return loading.load_base(folder, settings.model)
    if name == "final":
        return loading.load_base(folder, settings.model.model_copy(update={"quantization": "none"}))
    return loading.load_policy(models / "base", folder, settings.model)


def talk(model: Policy, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float) -> None:
    """Answer line by line; Ctrl-C ends an answer, which is then forgotten with its question."""
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    conversation: list[Turn] = []
    while True:
        try:
            line = input("\nyou> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            line = ""
        if not line:
            return
        if line == "/new":
            conversation = []
            continue
        conversation.append({"role": "user", "content": line})
        try:
            text = answer(model, tokenizer, conversation, max_new_tokens, temperature, streamer)
            conversation.append({"role": "assistant", "content": text})
        except KeyboardInterrupt:
            conversation.pop()
            print("\n(not kept)")
        except InputError as error:
            conversation.pop()
            print(f"error: {error}")


def answer(
    model: Policy,
    tokenizer: PreTrainedTokenizerBase,
    conversation: list[Turn],
    max_new_tokens: int,
    temperature: float,
    streamer: TextStreamer | None = None,
) -> str:
    """The model's next turn, by its generation config; with temperature 0 by greedy decoding.

    Raises:
        InputError: the conversation fills the model's context.
    """
    inputs = tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    length = inputs["input_ids"].shape[1]
    context = policies.bare(model).config.get_text_config().max_position_embeddings
    if length >= context:
        raise InputError(
            f"the conversation takes {length:,} tokens, and the model's context holds {context:,}; "
            "/new starts a new one"
        )
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    new_tokens = min(max_new_tokens, context - length)
    generated = model.generate(
        **inputs, **sampling, max_new_tokens=new_tokens, use_cache=True, streamer=streamer
    )
    return tokenizer.decode(generated[0, length:], skip_special_tokens=True)
