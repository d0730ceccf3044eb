"""Conversations to tokens and labels, through the run's chat template."""

import json
from collections.abc import Iterator, Sequence
from itertools import chain, islice, pairwise

from transformers import PreTrainedTokenizerBase

from reprotune.data.conversations import Conversation, Pair, Turn, leaves
from reprotune.data.raw_rows import InvalidRow
from reprotune.data.rendering import ANSWER, USER, Span, render
from reprotune.data.template_places import parts_of, places
from reprotune.data.templates import beginning, lead

IGNORED = -100
"""The label of a token without loss, as torch's cross entropy takes it."""

Tokens = dict[str, list[int]]
"""A tokenized row by column."""

Piece = tuple[str, str]
"""What stands before a piece of text, at least from the last special token on, and the piece."""

NUL = "\0"
"""A character that is in no row."""
TRIED = Conversation([USER, ANSWER, USER | {"content": "once more, 12"}, ANSWER | {"content": "say:\n 3 x"}])
"""A conversation whose tokens must be those of its whole text."""


class ChatTokens:
    """Tokenizes conversations, so that a completion follows the tokens that the model is asked with.

    Args:
        tokenizer: has the run's chat template, as `load_tokenizer` gives it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.places, self.lead = places(tokenizer), lead(tokenizer)
        self.backend, self.begin = tokenizer.backend_tokenizer, beginning(tokenizer)
        ((text, spans),) = render(tokenizer, [TRIED])
        pieces = self.cut(text, spans)
        for self.apart in (True, False):
            tried = chain(*self.pieces(behind_each_other(pieces)))
            if list(tried) == self.encoded(["".join(pieces)])[0]:
                return
        print(
            "the tokenizer joins the end of a prompt and the beginning of its answer into one token; "
            "answers are tokenized apart from their prompts, as the model is asked",
            flush=True,
        )

    def conversations(self, conversations: Sequence[Conversation]) -> list[Tokens]:
        """{input_ids, labels} of each conversation; labels are IGNORED outside completions.

        Raises:
            InvalidRow: the template cannot render one, has no place for a part of it, or does not mark all of
                its completions.
        """
        texts = []
        for conversation, (text, spans) in zip(conversations, self.rendered(conversations), strict=True):
            answers = [turn for turn in conversation.turns if turn["role"] == "assistant"]
            if len(spans) != len(answers):
                raise InvalidRow(f"the template marks {len(spans)} of {len(answers)} answers")
            texts.append((self.cut(text, spans), answers))
        encoded = iter(self.pieces([piece for pieces, _ in texts for piece in behind_each_other(pieces)]))
        return [row(list(islice(encoded, len(pieces))), answers) for pieces, answers in texts]

    def pairs(self, pairs: Sequence[Pair]) -> list[Tokens]:
        """{prompt_ids, chosen_ids, rejected_ids} of each pair; completions end with the end-of-turn token.

        Raises:
            InvalidRow: as for conversations, or the template renders two prompts.
        """
        chosen = self.rendered([prompt.answered(answer) for prompt, answer, _ in pairs])
        rejected = self.rendered([prompt.answered(answer) for prompt, _, answer in pairs])
        pieces: list[Piece] = []
        for (chosen_text, chosen_spans), (rejected_text, rejected_spans) in zip(
            chosen, rejected, strict=True
        ):
            if not chosen_spans or not rejected_spans:
                raise InvalidRow("the template does not mark the answer")
            prompt, answer = self.cut(chosen_text, chosen_spans[-1:])
            rejected_prompt, other_answer = self.cut(rejected_text, rejected_spans[-1:])
            if prompt != rejected_prompt:
                raise InvalidRow(
                    f"the template lets an answer change its prompt: {prompt!r} is not {rejected_prompt!r}"
                )
            pieces += [("", prompt), (prompt, answer), (prompt, other_answer)]
        encoded = self.pieces(pieces)
        return [
            {"prompt_ids": prompt_ids, "chosen_ids": chosen_ids, "rejected_ids": rejected_ids}
            for prompt_ids, chosen_ids, rejected_ids in zip(
                encoded[0::3], encoded[1::3], encoded[2::3], strict=True
            )
        ]

    def rendered(self, conversations: Sequence[Conversation]) -> list[tuple[str, list[Span]]]:
        for conversation in conversations:
            for part in parts_of(conversation):
                if part not in self.places:
                    raise InvalidRow(f"it has `{part}`, which the chat template has no place for")
        if "input" not in self.places:
            conversations = [conversation.joined() for conversation in conversations]
        rendered = render(self.tokenizer, conversations)
        for conversation, (text, _) in zip(conversations, rendered, strict=True):
            check_whole(conversation, text)
        for text, _ in rendered if self.begin else ():
            if not text.startswith(self.begin) or text[len(self.begin) :].lstrip().startswith(self.begin):
                raise InvalidRow(f"the template does not begin it with one {self.begin!r}")
        return rendered

    def cut(self, text: str, spans: Sequence[Span]) -> list[str]:
        """The text up to its last completion: prompt, completion, prompt, completion, and so on.

        Space behind an end-of-turn token belongs to the next prompt, as does what an answer is asked with.

        Raises:
            InvalidRow: an answer does not begin as the template asks for it.
        """
        edges = [0]
        for begin, end in spans:
            if not text.startswith(self.lead, begin):
                raise InvalidRow(f"an answer is asked for with {self.lead!r}, and does not begin with it")
            edges += [begin + len(self.lead), begin + len(text[begin:end].rstrip())]
        return [text[begin:end] for begin, end in pairwise(edges)]

    def pieces(self, pieces: Sequence[Piece]) -> list[list[int]]:
        """The tokens of pieces of text, tokenized together."""
        texts = [piece for _, piece in pieces]
        return self.encoded(texts) if self.apart else list(self.encoded_behind(pieces))

    def encoded(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encoded_behind(self, pieces: Sequence[Piece]) -> Iterator[list[int]]:
        """The tokens of pieces behind what stands before them.

        A tokenizer of SentencePiece's kind puts a space before what begins a text or follows a special
        token, and nowhere else. Where one token holds the end of one piece and the beginning of the next, NUL
        takes the place of what stands before: no token joins it.
        """
        before = self.encoded([before for before, _ in pieces])
        whole = self.encoded([before + piece for before, piece in pieces])
        for (_, piece), first, ids in zip(pieces, before, whole, strict=True):
            if ids[: len(first)] != first:
                first, ids = self.encoded([NUL, NUL + piece])
            yield ids[len(first) :]


def check_whole(conversation: Conversation, text: str) -> None:
    """Refuse a text in which something that was said is missing or out of order, whatever the space in it.

    Raises:
        InvalidRow: it is.
    """
    squeezed, place = without_space(text), 0
    for turn in conversation.turns:
        for key in ("content", "input"):
            if said := without_space(turn.get(key, "")):
                found = squeezed.find(said, place)
                if found < 0 and turn["role"] == "tool":
                    # some templates write a result as JSON
                    said = in_json(turn[key])
                    found = squeezed.find(said, place)
                if found < 0:
                    raise InvalidRow(
                        f"the template cuts or changes the {key} of a turn of the {turn['role']}"
                    )
                place = found + len(said)
        for part, said in beside(turn):
            if without_space(said) not in squeezed and in_json(said) not in squeezed:
                raise InvalidRow(f"the template cuts or changes {part} of a turn of the {turn['role']}")
    for said in leaves([tool.get("function", tool) for tool in conversation.tools]):
        if without_space(said) not in squeezed and in_json(said) not in squeezed:
            raise InvalidRow(f"the template leaves {said!r} of a tool out")


def beside(turn: Turn) -> Iterator[tuple[str, str]]:
    """What a turn says beside its content: the part, and a text."""
    if turn.get("reasoning_content"):
        yield "the reasoning_content", turn["reasoning_content"]
    for call in turn.get("tool_calls", ()):
        yield "a call", call["function"]["name"]
        yield from (("a call", said) for said in leaves(call["function"]["arguments"]))


def without_space(text: str) -> str:
    return "".join(text.split())


def in_json(text: str) -> str:
    """A text as it stands in JSON, without space."""
    return without_space(json.dumps(text, ensure_ascii=False)[1:-1])


def behind_each_other(pieces: Sequence[str]) -> list[Piece]:
    """The pieces of one text."""
    return list(zip(("", *pieces[:-1]), pieces, strict=True))


def row(pieces: Sequence[list[int]], answers: Sequence[Turn]) -> Tokens:
    """{input_ids, labels} from the tokens of prompts and completions in turn."""
    ids: list[int] = []
    labels: list[int] = []
    for prompt, completion, answer in zip(pieces[0::2], pieces[1::2], answers, strict=True):
        ids += prompt + completion
        trained = answer.get("train", True)
        labels += [IGNORED] * len(prompt) + (completion if trained else [IGNORED] * len(completion))
    return {"input_ids": ids, "labels": labels}
