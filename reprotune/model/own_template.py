"""The base model's own chat template, with its answers marked for training.

TRL has such templates for the common families (https://huggingface.co/docs/trl/chat_templates); those of
Llama 3.1 to 3.3 are marked here.
"""

from pathlib import Path

from transformers import AutoTokenizer
from trl.chat_template_utils import (
    get_training_chat_template,
    llama3_1_chat_template,
    llama3_2_chat_template,
)

from reprotune.data.templates import OWN_FILE
from reprotune.errors import InputError, first_line
from reprotune.records import write_text

LLAMA = "    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}"
"""The line before the turns of system, user and assistant in the templates of Llama 3.1 to 3.3."""
LLAMA_ANSWER = """\
    {%- if message.role == 'assistant' and 'tool_calls' not in message %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {%- generation %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endgeneration %}
    {%- elif not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}"""
LLAMA_DATE = '{%- set date_string = "26 Jul 2024" %}'
"""The date that these templates write where they know no other: one that is the same every day."""


def write(base: Path) -> None:
    """Write `base/OWN_FILE`; where no such template is known, one that raises the reason when it is used."""
    try:
        template = marked(base)
    except Exception as error:
        reason = str(error) if isinstance(error, InputError) else first_line(error)
        reason = reason.replace("\\", "\\\\").replace("'", "\\'")
        template = f"{{{{- raise_exception('{reason}') -}}}}"
    write_text(base / OWN_FILE, template)


def marked(base: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if tokenizer.chat_template is None:
        raise InputError("the base model has no chat template of its own")
    if tokenizer.chat_template in (llama3_1_chat_template, llama3_2_chat_template):
        assert tokenizer.chat_template.count(LLAMA) == 1
        return LLAMA_DATE + tokenizer.chat_template.replace(LLAMA, LLAMA_ANSWER)
    try:
        found = get_training_chat_template(tokenizer)
    except ValueError as error:
        raise InputError(
            "the base model's own chat template is of no family whose answers TRL can mark; copy it to "
            "templates/, put {% generation %} around its answers, and name it in model.chat_template"
        ) from error
    return tokenizer.chat_template if found is None else found
