"""From a conversation to token ids: where visual tokens stand, and which tokens the loss counts.

    chat      the LLM's own chat template; the loss is on the assistant's answers and the token that ends each of them
    plain     template or question, answer, end token: for captions, and for LLMs without a chat template
    document  one turn of the assistant and no other: text in which images may stand; all of its words count

Nothing here needs a model: a tokenizer and a `PromptConfig` do, so this runs in the processes that load data.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from vpgtrans.config import PromptConfig
from vpgtrans.errors import DataError, Dropped, RecipeError
from vpgtrans.layout import Layout, Layouts, Size

IMAGE = "<image>"
"""What stands for an image in a text."""
VISUAL = -1
"""What stands for a visual token among token ids."""
_PLACE = -2
"""What stands for an image among ids, until its layout is put in its place."""
_REMEMBERED = 1000
"""Texts whose ids are kept: the words of a template come with every sample."""
_ANCHORS = ("\n", ":", "0")
"""What a text may stand behind to be tokenised as the middle of another; the first that does not merge with it."""
# Private-use characters, which no template touches, mark places in a rendered conversation.
_ANSWER, _END, _PICTURE = "\ue000", "\ue001", "\ue002"

TOO_LONG = "too long"
"""The rule by which a sample is left out."""

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation; `<image>` in its text is the place of an image."""

    role: Role
    text: str


Text = str | Sequence[Turn]
"""A caption of one image, or a conversation."""


def turns_of(text: Text) -> Sequence[Turn]:
    """A caption as the conversation that it stands for."""
    return (Turn("user", IMAGE), Turn("assistant", text)) if isinstance(text, str) else text


def answer_of(text: Text) -> str:
    """What the assistant says, all its turns."""
    return text if isinstance(text, str) else " ".join(turn.text for turn in text if turn.role == "assistant")


def count_images(text: Text) -> int:
    """How many images a conversation has places for."""
    return sum(turn.text.count(IMAGE) for turn in turns_of(text))


class TooLong(Dropped):
    """A sample whose first question with its images leaves no room for an answer: it is dropped, and counted."""


@dataclass(frozen=True)
class Encoded:
    """A conversation as token ids.

    Attributes:
        ids: int64 [L], `VISUAL` where a visual token stands. answer: bool [L], the tokens that the loss counts.
        images: how many of the conversation's images are in it, from the first one on.
        cut: what was left out of a long sample: nothing, whole turns at the end, or the end of the first answer.
        layouts: of these images, in order.
    """

    ids: np.ndarray
    answer: np.ndarray
    images: int
    cut: Literal["", "turns", "answer"] = ""
    layouts: tuple[Layout, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def answers(self) -> int:
        """How many tokens the loss counts."""
        return int(self.answer.sum())

    @property
    def pieces(self) -> int:
        """How many pieces its images have: tiles and thumbnails, or one of each image."""
        return sum(layout.pieces for layout in self.layouts)


class Prompter:
    """Conversations as token ids of one LLM."""

    def __init__(
        self,
        tokenizer: Any,
        config: PromptConfig,
        *,
        visual_tokens: int,
        layouts: Layouts | None = None,
        limit: int | None = None,
    ):
        """visual_tokens: of an image; or layouts, where they depend on its size. limit: of the LLM, in tokens;
        `config.max_tokens` may set a lower one.

        Raises:
            RecipeError: a chat is asked for, and the tokenizer has no chat template; or as `check_attention`.
        """
        check_attention(config, layouts)
        self.tokenizer = tokenizer
        self.config = config
        self.visual_tokens = visual_tokens
        self.layouts = layouts
        if config.format == "chat" and not tokenizer.chat_template:
            raise RecipeError(
                "prompt.format is chat, but the LLM's tokenizer has no chat template; right would be plain"
            )
        limits = [tokens for tokens in (config.max_tokens, limit) if tokens is not None]
        self.max_tokens = min(limits) if limits else None
        self._known: dict[str, list[int]] = {}
        self._known_layouts: dict[Layout, list[int]] = {}

    def encode(self, text: Text, sizes: Sequence[Size] = ()) -> Encoded:
        """Token ids of a conversation, at most `max_tokens`.

        A longer one loses whole exchanges at its end; if its first exchange alone is too long, the end of its answer.
        Images are never cut.

        Args:
            sizes: width and height of its images; needed only where there are `layouts`.

        Raises:
            TooLong: the first question with its images leaves no room for a token of an answer.
        """
        turns = list(turns_of(text))
        whole, spans = self._encode(turns, sizes)
        if self.max_tokens is None or len(whole) <= self.max_tokens:
            return whole
        if len(turns) > 1:
            ends = [place + 1 for place, turn in enumerate(turns) if turn.role == "assistant"]
            for end in reversed(ends[:-1]):
                shorter, _ = self._encode(turns[:end], sizes)
                if len(shorter) <= self.max_tokens:
                    return replace(shorter, cut="turns")
            whole, spans = self._encode(turns[: ends[0]], sizes)
        first = int(np.argmax(whole.answer))
        end = self.max_tokens
        # Not through the middle of an image: a document loses the whole image at which it would be cut.
        for start, stop in reversed(spans):
            if start < end <= stop:
                end = start
        kept = whole.answer[:end]
        if not kept.any():
            pieces = sum(layout.pieces for layout in whole.layouts)
            tiles = f" ({whole.images} images in {pieces} pieces)" if pieces > whole.images else ""
            raise TooLong(
                f"{len(whole)} tokens, {first} of them before the answer{tiles}; {self.max_tokens} are allowed: "
                f"{TOO_LONG}"
            )
        images = sum(stop <= end for _, stop in spans)
        return Encoded(whole.ids[:end], kept, images, cut="answer", layouts=whole.layouts[:images])

    def question(self, turns: Sequence[Turn], sizes: Sequence[Size] = (), *, room: int = 0) -> np.ndarray:
        """What stands before an answer, int64 [L]: the same ids as in training.

        sizes: as for `encode`. room: tokens that the answer may take.

        Raises:
            TooLong: question and answer together are longer than the LLM takes.
        """
        pieces = self._pieces([*turns, Turn("assistant", "")])
        ids = self._with_images([token for piece, _ in pieces for token in piece], self.laid_out(turns, sizes))
        if self.max_tokens is not None and len(ids) + room > self.max_tokens:
            raise TooLong(
                f"{len(ids)} tokens before an answer of {room}, where {self.max_tokens} are allowed: {TOO_LONG}"
            )
        return ids

    def template(self, text: str, sizes: Sequence[Size] = ()) -> np.ndarray:
        """A template with `<image>` as it stands, int64 [L]; what `write` goes on from."""
        ids = self._with_start([token for piece in self._around_images(text) for token in piece])
        return self._with_images(ids, self.laid_out([Turn("user", text)], sizes))

    # --- images ---------------------------------------------------------------------------------

    def laid_out(self, turns: Sequence[Turn], sizes: Sequence[Size]) -> tuple[Layout, ...]:
        """Of each place of an image.

        Raises:
            DataError: the layouts depend on sizes, and there are fewer images than places.
        """
        count = count_images(turns)
        if self.layouts is None:
            return (Layout(self.visual_tokens),) * count
        if len(sizes) < count:
            raise DataError(f"{count} times {IMAGE}, and {len(sizes)} images; right would be one for each")
        return tuple(self.layouts(size) for size in sizes[:count])

    def _with_images(self, ids: Sequence[int], layouts: Sequence[Layout]) -> np.ndarray:
        """Ids with every image put in its place, int64 [L]."""
        images = iter(layouts)
        stretches = [self._layout_ids(next(images)) if token == _PLACE else [token] for token in ids]
        return np.array([token for stretch in stretches for token in stretch], dtype=np.int64)

    def _layout_ids(self, layout: Layout) -> list[int]:
        """`VISUAL` for each visual token of an image, its marks between them."""
        if layout not in self._known_layouts:
            if len(self._known_layouts) >= _REMEMBERED:
                self._known_layouts.clear()
            visual = [VISUAL] * layout.tokens
            ids = [token for words in layout.marked() for token in [*self._later_ids(words), *visual]]
            self._known_layouts[layout] = ids
        return self._known_layouts[layout]

    # --- pieces ---------------------------------------------------------------------------------

    def _encode(self, turns: Sequence[Turn], sizes: Sequence[Size]) -> tuple[Encoded, list[tuple[int, int]]]:
        """A whole conversation, and where each of its images begins and ends."""
        layouts = self.laid_out(turns, sizes)
        ids: list[int] = []
        counts: list[bool] = []
        spans: list[tuple[int, int]] = []
        for piece, counted in self._pieces(turns):
            for token in piece:
                if token != _PLACE:
                    ids.append(token)
                    counts.append(counted)
                else:
                    image = self._layout_ids(layouts[len(spans)]) if len(spans) < len(layouts) else []
                    spans.append((len(ids), len(ids) + len(image)))
                    ids += image
                    counts += [False] * len(image)
        if len(spans) != len(layouts):
            raise DataError(f"{len(layouts)} times {IMAGE}, of which {len(spans)} can be places of images; right would "
                            "be in a user's turn or a document")  # fmt: skip
        counts[:1] = [False]  # nothing stands before it, so nothing predicts it
        encoded = Encoded(np.array(ids, dtype=np.int64), np.array(counts, dtype=bool), len(spans), layouts=layouts)
        return encoded, spans

    def _pieces(self, turns: Sequence[Turn]) -> Iterator[tuple[list[int], bool]]:
        """Stretches of ids, and whether the loss counts them. An empty last answer is where an answer is to begin."""
        if len(turns) == 1 and turns[0].role == "assistant":
            yield self._with_start([]), False
            if turns[0].text:
                for piece in self._around_images(turns[0].text):
                    yield piece, True
                yield self._end_ids, True
        elif self._is_chat(turns):
            yield from self._chat_pieces(turns)
        else:
            yield from self._plain_pieces(turns)

    def _is_chat(self, turns: Sequence[Turn]) -> bool:
        """Of a conversation: whether the chat template is taken. A caption has no words of a user's to put into it."""
        if self.config.format == "auto":
            asked = any(_split_images(turn.text)[1] for turn in turns if turn.role != "assistant")
            return asked and bool(self.tokenizer.chat_template)
        return self.config.format == "chat"

    def _plain_pieces(self, turns: Sequence[Turn]) -> Iterator[tuple[list[int], bool]]:
        before = ""
        started = False
        for turn in turns:
            if turn.role != "assistant":
                before += f"{turn.text}\n" if turn.role == "system" else self._plain_question(turn.text)
                continue
            context = [token for piece in self._around_images(before, first=not started) for token in piece]
            yield (context if started else self._with_start(context)), False
            started = True
            if turn.text:
                # After a template like "Name:" a word starts with a space, which belongs to its token.
                apart = "" if not before or before[-1:].isspace() or before.endswith(IMAGE) else " "
                yield self._later_ids(apart + turn.text), True
                yield self._end_ids, True
            before = "\n"

    def _plain_question(self, text: str) -> str:
        """A user's turn as text: images alone are put into the template, words after images into the question."""
        images, rest = _split_images(text)
        if not rest:
            return self.config.template.replace(IMAGE, IMAGE * images, 1)
        return IMAGE * images + self.config.question.replace("{question}", rest)

    def _chat_pieces(self, turns: Sequence[Turn]) -> Iterator[tuple[list[int], bool]]:
        head, *answers = self._render(turns).split(_ANSWER)
        before, apart = _without_spaces(head)
        yield self._marked_ids(before, first=True), False
        for position, part in enumerate(answers, start=1):
            last = position == len(answers)
            answer, _, after = part.partition(_END)
            if last and not turns[-1].text:
                return
            yield self._later_ids(apart + answer.strip()), True
            after, apart = _without_spaces(after)
            ids = self._marked_ids(after)
            end = self._end_of_turn(ids)
            if last:  # what a template puts behind the end of the last answer says nothing
                yield ids[:end] or self._end_ids, True
                return
            yield ids[:end], True
            yield ids[end:], False

    def _render(self, turns: Sequence[Turn]) -> str:
        """The template's text, with marks for answers and images."""
        messages = [{"role": turn.role, "content": self._marked(turn)} for turn in turns]
        for form in (messages, _without_system(messages)):
            try:
                rendered = self.tokenizer.apply_chat_template(form, tokenize=False)
            except Exception as error:  # templates raise what they like about roles that they do not know
                problem = error
                continue
            if rendered.count(_ANSWER) == sum(turn.role == "assistant" for turn in turns) and all(
                message["content"].strip() in rendered for message in form
            ):
                return rendered
            problem = ValueError("it leaves out a turn, or a part of one such as <think>…</think> in an answer")
        raise DataError(f"the LLM's chat template does not take this conversation: {problem}") from problem

    def _marked(self, turn: Turn) -> str:
        text = turn.text
        if turn.role == "user" and not _split_images(text)[1]:
            text = f"{text.strip()}\n{self.config.request}".lstrip("\n")
        text = text.replace(IMAGE, _PICTURE)
        return f"{_ANSWER}{text}{_END}" if turn.role == "assistant" else text

    def _marked_ids(self, text: str, *, first: bool = False) -> list[int]:
        return [t for piece in self._around_images(text.replace(_PICTURE, IMAGE), first=first) for t in piece]

    def _end_of_turn(self, ids: list[int]) -> int:
        """How many of the ids behind an answer end it: up to the first token that is no text, over white space alone.

        Some vocabularies have their `<|im_end|>` as an added token that is not marked as special.
        """
        for place, token in enumerate(ids):
            if token in self._special:
                return place + 1
            if self.tokenizer.decode([token]).strip():
                return place + 1 if token in self.tokenizer.added_tokens_decoder else 0
        return 0

    def _around_images(self, text: str, *, first: bool = True) -> Iterator[list[int]]:
        """Ids of the words between images, and of the images. first: nothing stands before the text."""
        for place, words in enumerate(text.split(IMAGE)):
            if place:
                yield [_PLACE]
            yield self._ids(words) if first and not place else self._later_ids(words)

    def _with_start(self, ids: list[int]) -> list[int]:
        """With the token that begins a text, where the LLM has one; a template may begin with it already."""
        start = self.tokenizer.bos_token_id
        return ids if start is None or ids[:1] == [start] else [start, *ids]

    @cached_property
    def ends(self) -> list[int]:
        """Tokens at which an answer is over: the end of a text and, for chats, of a turn; often two (Gemma, Phi-3)."""
        ends = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        if self.config.format != "plain" and self.tokenizer.chat_template:
            learnt = self.encode([Turn("user", "a"), Turn("assistant", "a")])
            last = int(learnt.ids[learnt.answer][-1])
            if last in self.tokenizer.added_tokens_decoder and last not in ends:
                ends.append(last)
        return ends

    @cached_property
    def _end_ids(self) -> list[int]:
        end = self.tokenizer.eos_token_id
        return [end] if self.config.end and end is not None else []

    @cached_property
    def _special(self) -> frozenset[int]:
        added = {token for token, entry in self.tokenizer.added_tokens_decoder.items() if entry.special}
        return frozenset(added) | frozenset(self.tokenizer.all_special_ids)

    def _ids(self, text: str) -> list[int]:
        if not text:
            return []
        if text not in self._known:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self._known[text]

    def _later_ids(self, text: str) -> list[int]:
        """Ids of a text that stands behind something: without the space that SentencePiece puts before a first word."""
        behind = self._ids_behind_anchor(text) if text and self._adds_prefix else None
        return self._ids(text) if behind is None else behind

    def _ids_behind_anchor(self, text: str) -> list[int] | None:
        """None where every anchor merges with the text or vanishes."""
        for anchor in _ANCHORS:
            head, whole = self._ids(anchor), self._ids(anchor + text)
            if head and whole[: len(head)] == head:
                return whole[len(head) :]
        return None

    @cached_property
    def _adds_prefix(self) -> bool:
        """Whether a word at the start of a text has other ids than inside one; where not, texts are taken alone."""
        behind = self._ids_behind_anchor("a")
        return behind is not None and behind != self._ids("a")


def check_attention(config: PromptConfig, layouts: Layouts | None) -> None:
    """Raises RecipeError where images in their native size are to see both ways: where one ends can't be told."""
    if config.image_attention == "bidirectional" and layouts is not None and layouts.native:
        raise RecipeError("prompt.image_attention: bidirectional does not go with fit: native; right would be tiles")


def _split_images(text: str) -> tuple[int, str]:
    """How many images a turn begins with, and the words behind them."""
    rest, images = text.strip(), 0
    while rest.startswith(IMAGE):
        rest, images = rest.removeprefix(IMAGE).lstrip(), images + 1
    return images, rest


def _without_spaces(text: str) -> tuple[str, str]:
    """What stands before an answer, and the spaces between them: these belong to the answer's first token."""
    before = text.rstrip(" ")
    return before, text[len(before) :]


def _without_system(messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """For templates that know no system role (Gemma): its text comes before the first user's."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    others = [dict(message) for message in messages if message["role"] != "system"]
    if system and others and others[0]["role"] == "user":
        others[0]["content"] = f"{system}\n\n{others[0]['content']}"
    return others
