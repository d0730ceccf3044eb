"""Talk to a model of this run in the terminal: the base, what SFT or DPO made of it, or the merged one.

    python -m stages.chat dpo

Each as it is scored: through the run's chat template, and with params.yaml's quantization, but for `final`, which is whole. An empty line or Ctrl-D ends it, `/new`
forgets what was said, Ctrl-C ends an answer.
"""

import argparse
import sys
from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer

from stages import InputError, command, modeling, params
from stages.formats import Conversation
from stages.modeling import Policy
from stages.templating import load_tokenizer

NAMES = ("base", "sft", "dpo", "final")


def load(name: str, settings: params.Params, models: Path) -> Policy:
    if not (models / name).exists():
        raise InputError(f"{models / name}: no such folder; `dvc repro {'merge' if name == 'final' else name}` makes it, `dvc pull {models / name}` fetches it")
    if name == "base":
        return modeling.load_base(models / name, settings.model)
    if name == "final":
        return modeling.load_base(models / name, settings.model.model_copy(update={"quantization": "none"}))
    return modeling.load_policy(models / "base", models / name, settings.model)


def answer(model: Policy, tokenizer: PreTrainedTokenizerBase, said: Conversation, max_new_tokens: int, temperature: float, streamer: TextStreamer | None = None) -> str:
    """What the model says next, up to the end of its turn; with temperature 0 its likeliest words.

    Raises:
        InputError: what was said fills the model's context.
    """
    inputs = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt", return_dict=True).to(model.device)
    length, most = inputs["input_ids"].shape[1], modeling.bare(model).config.get_text_config().max_position_embeddings
    if length >= most:
        raise InputError(f"what was said takes {length:,} tokens, and the model's context holds {most:,}; /new starts anew")
    drawn = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    config = GenerationConfig(
        **drawn, max_new_tokens=min(max_new_tokens, most - length), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, use_cache=True
    )
    made = model.generate(**inputs, generation_config=config, streamer=streamer)
    return tokenizer.decode(made[0, length:], skip_special_tokens=True)


def talk(model: Policy, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float) -> None:
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    said: Conversation = []
    while True:
        try:
            line = input("\nyou> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            line = ""
        if not line:
            return
        if line == "/new":
            said = []
            continue
        said.append({"role": "user", "content": line})
        try:
            said.append({"role": "assistant", "content": answer(model, tokenizer, said, max_new_tokens, temperature, streamer)})
        except KeyboardInterrupt:
            said.pop()
            print("\n(not kept)")
        except InputError as error:
            said.pop()
            print(f"error: {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=NAMES)
    parser.add_argument("--models", type=Path, default="models")
    parser.add_argument("--templates", type=Path, default="templates")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest words: the same answer each time")
    arguments = parser.parse_args()
    if arguments.max_new_tokens < 1 or not 0 <= arguments.temperature < 100:
        parser.error(f"found --max-new-tokens {arguments.max_new_tokens} and --temperature {arguments.temperature}, expected at least 1, and at least 0")
    settings = params.load()
    modeling.start(settings.seed, warn_only=True)
    model = load(arguments.model, settings, arguments.models)
    tokenizer = load_tokenizer(arguments.models / "base", arguments.templates / f"{settings.model.chat_template}.jinja")
    print(f"{arguments.models / arguments.model}: an empty line ends this, /new starts anew", file=sys.stderr)
    talk(model, tokenizer, arguments.max_new_tokens, arguments.temperature)


if __name__ == "__main__":
    command(main)
