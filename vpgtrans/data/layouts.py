"""From a record to a sample: which of its columns are images, captions, questions, turns."""

import base64
import binascii
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from vpgtrans.data.config import DataSource
from vpgtrans.errors import DataError, Dropped
from vpgtrans.prompts import IMAGE, Role, Text, Turn, count_images, turns_of

_ROLES: dict[str, Role] = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
    "system": "system",
}  # fmt: skip
_PATH_LENGTH = 1024
"""A longer string in an image column is base64."""
_SIGNATURES = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"II*\0", b"MM\0*")
"""How images begin: a shorter string that holds one is base64, too."""

Image = bytes | str
Parsed = tuple[Text, list[Image], list[str]]
"""Text, images, accepted answers."""


def layout_of(source: DataSource) -> str:
    """caption, question, conversation, document or text."""
    for name in ("question", "conversation", "document", "text"):
        if getattr(source, name) is not None:
            return name
    return "caption"


def columns_of(source: DataSource) -> dict[str, str]:
    """What a layout needs of a record: {key of the recipe: column}. Images may be missing in all but captions."""
    layout = layout_of(source)
    needed = {"caption": ["image", "caption"], "question": ["question", "answer"]}.get(layout, [layout])
    return {name: getattr(source, name) or name for name in needed}


def parse(record: Mapping[str, Any], source: DataSource) -> Parsed:
    """
    Raises:
        DataError: a column is missing or holds something else. Dropped: there is nothing to learn in the row.
    """
    for role, column in columns_of(source).items():
        if column not in record:
            raise DataError(
                f"no {column!r} for the {role}; there is {', '.join(map(repr, record)) or 'nothing'} "
                f"(name another with `{role}:` in the data source, or --{role})"
            )
    text, images, references = _LAYOUTS[layout_of(source)](record, source)
    _check_characters(
        [*(turn.text for turn in turns_of(text)), *(i for i in images if isinstance(i, str)), *references]
    )
    if (places := count_images(text)) != len(images):
        raise DataError(f"{places} times {IMAGE} in the text for {len(images)} images; right would be one for each")
    return text, images, references


def _check_characters(texts: Sequence[str]) -> None:
    """JSON can spell halves of characters, which no tokenizer and no file name takes."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"half a character at place {error.start} of {text[:40]!r}; JSON writes one beyond U+FFFF "
                            "as two escapes") from error  # fmt: skip


def _caption(record: Mapping[str, Any], source: DataSource) -> Parsed:
    images = _images(record[source.image], source.image)
    column = columns_of(source)["caption"]
    captions = _texts(record[column], column)
    if not captions:
        raise Dropped("no caption")
    if not images:
        raise DataError(f"no image in {source.image!r}")
    if len(images) == 1 and IMAGE not in captions[0]:
        return captions[0], images, captions
    return (Turn("user", IMAGE * len(images)), Turn("assistant", _unmarked(captions[0]))), images, captions


def _question(record: Mapping[str, Any], source: DataSource) -> Parsed:
    assert source.question is not None
    assert source.answer is not None
    images = _images(record.get(source.image), source.image)
    questions, answers = _texts(record[source.question], source.question), _texts(record[source.answer], source.answer)
    if not questions or not answers:
        raise Dropped("no answer" if questions else "no question")
    asked = questions[0]
    if images and IMAGE not in asked:
        asked = f"{IMAGE * len(images)}\n{asked}"
    return (Turn("user", asked), Turn("assistant", _unmarked(answers[0]))), images, answers


def _conversation(record: Mapping[str, Any], source: DataSource) -> Parsed:
    assert source.conversation is not None
    said = record[source.conversation]
    if not isinstance(said, list) or not all(isinstance(turn, Mapping) for turn in said):
        raise DataError(f"{source.conversation!r} is no list of turns; right would be [{{from, value}}, …] or "
                        "[{role, content}, …]")  # fmt: skip
    images = _images(record.get(source.image), source.image)
    turns: list[Turn] = []
    for number, turn in enumerate(said, start=1):
        speaker = turn.get("from", turn.get("role"))
        if not isinstance(speaker, str) or speaker not in _ROLES:
            raise DataError(f"turn {number} is from {speaker!r}; right would be one of {', '.join(_ROLES)}")
        content = turn.get("value", turn.get("content"))
        if isinstance(content, list):
            content, shown = _joined_parts(content, number)
            images += shown
        if not isinstance(content, str):
            raise DataError(f"turn {number} holds {type(content).__name__}; right would be a string")
        role = _ROLES[speaker]
        turns.append(Turn(role, _unmarked(content.strip()) if role == "assistant" else content.strip()))
    if not any(turn.role == "assistant" and turn.text for turn in turns):
        raise Dropped("no answer")
    _check_order(turns)
    answered = list(turns)
    while answered[-1].role != "assistant" or not answered[-1].text:  # a question that nobody answered
        answered.pop()
    for number, turn in enumerate(answered, start=1):
        if turn.role == "assistant" and not turn.text:
            raise DataError(f"turn {number} is an empty answer; right would be one with text, or none of the turns "
                            "behind it")  # fmt: skip
    if count_images(turns) == len(images):  # those of the questions that were left out stand last
        images = images[: count_images(answered)]
    return tuple(answered), images, [answered[-1].text]


def _check_order(turns: Sequence[Turn]) -> None:
    """Raises DataError unless user and assistant take turns, after a system's word at most."""
    spoken = [turn.role for turn in turns if turn.role != "system"]
    if spoken[0] != "user" or any(a == b for a, b in pairwise(spoken)):
        raise DataError(f"turns of {', '.join(spoken)}; right would be user and assistant in turn, the user first")


def _joined_parts(parts: Sequence[Any], number: int) -> tuple[str, list[Image]]:
    """Content in parts, as chat APIs write it, as one text; and the images that parts carry."""
    text, images = "", []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        elif kind in ("image", "image_url"):
            text += IMAGE
            images += _images(_shown(part), kind)
        else:
            raise DataError(f"turn {number} has a part of type {kind!r}; right would be text, image or image_url")
    return text, images


def _shown(part: Mapping[str, Any]) -> Any:
    """The image of a part of a turn."""
    found = part.get("image", part.get("image_url"))
    return found["url"] if isinstance(found, Mapping) and "url" in found else found


def _document(record: Mapping[str, Any], source: DataSource) -> Parsed:
    assert source.document is not None
    value = record[source.document]
    images = _images(record.get(source.image), source.image)
    if isinstance(value, list):  # null where an image stands; `images` may have null where a text stands (OBELICS)
        if not all(part is None or isinstance(part, str) for part in value):
            raise DataError(f"{source.document!r} holds other parts than texts and null")
        value = "".join(IMAGE if part is None else part for part in value)
    if not isinstance(value, str):
        raise DataError(f"{source.document!r} holds {type(value).__name__}; right would be a string or a list")
    if not value.replace(IMAGE, "").strip():
        raise Dropped("no text")
    return (Turn("assistant", value),), images, [value]


def _text(record: Mapping[str, Any], source: DataSource) -> Parsed:
    assert source.text is not None
    texts = _texts(record[source.text], source.text)
    if not texts:
        raise Dropped("no text")
    return (Turn("assistant", _unmarked(texts[0])),), [], texts[:1]


_LAYOUTS: dict[str, Callable[[Mapping[str, Any], DataSource], Parsed]] = {
    "caption": _caption,
    "question": _question,
    "conversation": _conversation,
    "document": _document,
    "text": _text,
}


def _unmarked(text: str) -> str:
    """An answer that is no document has no place for images."""
    if IMAGE in text:
        raise DataError(f"{IMAGE} in an answer; only a question or a document has places for images")
    return text


def _texts(value: Any, column: str) -> list[str]:
    """A text or a list of them (or of objects with a key `answer`) as those that are not empty."""
    values = value if isinstance(value, list) else [value]
    values = [entry["answer"] if isinstance(entry, Mapping) and "answer" in entry else entry for entry in values]
    if wrong := next((v for v in values if v is not None and not isinstance(v, str)), None):
        raise DataError(f"{column!r} holds {type(wrong).__name__}; right would be a string or a list of strings")
    return [text for v in values if isinstance(v, str) and (text := v.strip())]


def _images(value: Any, column: str) -> list[Image]:
    values = value if isinstance(value, list) else [value]
    return [_image(entry, column) for entry in values if entry is not None]


def _image(value: Any, column: str) -> Image:
    if isinstance(value, Mapping):  # as `datasets` keeps one
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if isinstance(value, str) and value:
        if value.startswith("data:"):
            return _decoded(value.partition(",")[2], column)
        return _decoded(value, column) if _is_base64(value) else value
    raise DataError(
        f"{column!r} holds {'nothing' if not value else type(value).__name__}; right would be encoded image bytes, "
        "base64, or the path of an image file"
    )


def _is_base64(text: str) -> bool:
    """Whether a string is the whole of an image, which no path is: most have a dot, which base64 has not."""
    if "://" in text:  # signed ones are longer than any path
        return False
    if len(text) > _PATH_LENGTH:
        return True
    try:
        return base64.b64decode(text, validate=True).startswith(_SIGNATURES)
    except ValueError:
        return False


def _decoded(text: str, column: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{column!r} is no valid base64 ({error})") from error


def named_files(value: Any) -> Iterator[str]:
    """Paths, as they are written, in what a column of images or of turns holds; what is malformed has none."""
    for entry in value if isinstance(value, list) else [value]:
        if isinstance(entry, Mapping):
            parts = entry.get("value", entry.get("content"))
            for part in parts if isinstance(parts, list) else ():
                if isinstance(part, Mapping):
                    yield from named_files(_shown(part))
            entry = entry.get("path") if entry.get("bytes") is None else None
        if isinstance(entry, str) and entry and not ("://" in entry or entry.startswith("data:") or _is_base64(entry)):
            yield entry


def located(image: Image, folder: Path | None) -> Image:
    """A path made absolute; URLs and bytes as they are."""
    if isinstance(image, bytes) or "://" in image or folder is None:
        return image
    return str(folder / image)
