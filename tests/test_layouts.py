"""From a record to a sample: captions, questions, conversations, documents, plain text, and what is wrong with them."""

import base64
from typing import Any

import pytest
from data_files import IMAGES
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from vpgtrans.data.config import DataSource
from vpgtrans.data.layouts import layout_of, parse
from vpgtrans.errors import DataError, Dropped
from vpgtrans.prompts import IMAGE, Text, Turn, count_images

ENCODED = base64.b64encode(IMAGES[0]).decode()


def source(**keys: Any) -> DataSource:
    return DataSource(dataset="x", **keys)


def turns(*texts: str, first: str = "user") -> tuple[Turn, ...]:
    """User and assistant in turn."""
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return tuple(Turn(roles[place % 2], text) for place, text in enumerate(texts))  # type: ignore[arg-type]


def said(*texts: str) -> list[dict[str, str]]:
    return [{"from": ["human", "gpt"][place % 2], "value": text} for place, text in enumerate(texts)]


def check(record: dict[str, Any], keys: dict[str, Any], text: Text, images: list[Any], references: list[str]) -> None:
    found = parse(record, source(**keys))
    assert found == (text, images, references)
    assert count_images(found[0]) == len(found[1])


# --- each layout --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "text", "images", "references"),
    [
        ({"image": "a.png", "caption": " a cat \n"}, "a cat", ["a.png"], ["a cat"]),
        ({"image": "a.png", "caption": ["", None, "x", "y"]}, "x", ["a.png"], ["x", "y"]),
        ({"image": ["a.png", None, "b.png"], "caption": "two"}, turns(IMAGE * 2, "two"), ["a.png", "b.png"], ["two"]),
        ({"image": ["a.png"], "caption": "x"}, "x", ["a.png"], ["x"]),
    ],
    ids=["one", "several", "images", "list-of-one"],
)
def test_captions(record: dict[str, Any], text: Text, images: list[Any], references: list[str]):
    check(record, {}, text, images, references)


@pytest.mark.parametrize(
    ("question", "image", "answer", "text", "references"),
    [
        ("What?", "a.png", "this", turns(f"{IMAGE}\nWhat?", "this"), ["this"]),
        ("What?", ["a.png", "b.png"], "this", turns(f"{IMAGE}{IMAGE}\nWhat?", "this"), ["this"]),
        (f"Is {IMAGE} it?", "a.png", "no", turns(f"Is {IMAGE} it?", "no"), ["no"]),
        ("What?", None, "this", turns("What?", "this"), ["this"]),
        ("What?", "a.png", ["a", "b"], turns(f"{IMAGE}\nWhat?", "a"), ["a", "b"]),
        ("What?", "a.png", [{"answer": "a", "by": 1}, {"answer": "b"}], turns(f"{IMAGE}\nWhat?", "a"), ["a", "b"]),
    ],
    ids=["one", "two-images", "own-place", "no-image", "answers", "objects"],
)
def test_questions(question: str, image: Any, answer: Any, text: Text, references: list[str]):
    images = image if isinstance(image, list) else [image] if image else []
    record = {"image": image, "q": question, "a": answer}
    check(record, {"question": "q", "answer": "a"}, text, images, references)


@pytest.mark.parametrize("names", [("human", "gpt"), ("user", "assistant"), ("user", "model")])
@pytest.mark.parametrize("keys", [("from", "value"), ("role", "content")])
def test_roles_by_every_name(names: tuple[str, str], keys: tuple[str, str]):
    speaker, words = keys
    record = {"c": [{speaker: "system", words: "Be kind."}, {speaker: names[0], words: " Hi "},
                    {speaker: names[1], words: "Hello"}]}  # fmt: skip
    check(record, {"conversation": "c"}, (Turn("system", "Be kind."), *turns("Hi", "Hello")), [], ["Hello"])


def test_conversations_of_several_turns_and_images():
    texts = (f"{IMAGE}\nWhat?", "A cat.", f"And {IMAGE}{IMAGE}?", "Dogs.")
    check(
        {"image": ["a", "b", "c"], "c": said(*texts)}, {"conversation": "c"}, turns(*texts), ["a", "b", "c"], ["Dogs."]
    )
    # a question that nobody answered says nothing
    check({"c": said("Hi", "Hello", "Bye")}, {"conversation": "c"}, turns("Hi", "Hello"), [], ["Hello"])
    check({"c": said("Hi", "Hello", "Bye", " ", "Bye!")}, {"conversation": "c"}, turns("Hi", "Hello"), [], ["Hello"])
    # and its images are left out with it
    record = {"image": ["a", "b"], "c": said(f"{IMAGE} Hi", "Hello", f"{IMAGE} Bye", "")}
    check(record, {"conversation": "c"}, turns(f"{IMAGE} Hi", "Hello"), ["a"], ["Hello"])


def test_content_in_parts():
    parts = [
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": "and"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{ENCODED}"}},
        {"type": "image_url", "image_url": "https://example.org/c.png"},
        {"type": "text", "text": "?"},
    ]
    record = {"c": [{"role": "user", "content": parts}, {"role": "assistant", "content": "!"}]}
    images = ["a.png", IMAGES[0], "https://example.org/c.png"]
    check(record, {"conversation": "c"}, turns(f"{IMAGE}and{IMAGE}{IMAGE}?", "!"), images, ["!"])


@pytest.mark.parametrize(
    ("value", "images", "text"),
    [
        (f"a {IMAGE} b {IMAGE}", ["x", "y"], f"a {IMAGE} b {IMAGE}"),
        (["a ", None, " b ", None], ["x", "y"], f"a {IMAGE} b {IMAGE}"),
        (["a ", None, " b ", None], [None, "x", None, "y"], f"a {IMAGE} b {IMAGE}"),
        ("words", None, "words"),
        (f"{IMAGE} one", "x", f"{IMAGE} one"),
    ],
    ids=["marks", "nulls", "both", "none", "single"],
)
def test_documents(value: Any, images: Any, text: str):
    shown = [i for i in (images if isinstance(images, list) else [images]) if i]
    check({"image": images, "d": value}, {"document": "d"}, (Turn("assistant", text),), shown, [text])


def test_plain_text_has_no_images():
    check({"image": "a.png", "t": " words "}, {"text": "t"}, (Turn("assistant", "words"),), [], ["words"])


# --- images -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [IMAGES[0], ENCODED, f"data:image/png;base64,{ENCODED}", {"bytes": IMAGES[0], "path": "a.png"}],
    ids=["bytes", "base64", "data-url", "struct"],
)
def test_an_image_in_the_record(value: Any):
    assert len(ENCODED) < 1024, "short enough to be taken for a path"
    assert parse({"image": value, "caption": "x"}, source())[1] == [IMAGES[0]]


@pytest.mark.parametrize(
    "value",
    ["a.png", "/abs/a.png", "s3://bucket/a.png", "iVBORw0KGgo", "iVBORw0KGgo=.png", "/9j/a.jpg", {"path": "a.png"},
     {"bytes": None, "path": "a.png"}, f"https://example.org/a.jpg?signature={'A' * 1200}"],
)  # fmt: skip
def test_an_image_path(value: Any):
    path = value["path"] if isinstance(value, dict) else value
    assert parse({"image": value, "caption": "x"}, source())[1] == [path]


def test_long_base64():
    content = IMAGES[0] + bytes(5000)
    assert parse({"image": base64.b64encode(content).decode(), "caption": "x"}, source())[1] == [content]


# --- wrong rows ---------------------------------------------------------------------------------

CHAT = {"conversation": "c"}
ASKED = {"question": "q", "answer": "a"}


@pytest.mark.parametrize(
    ("record", "keys", "message"),
    [
        ({"caption": "x"}, {}, "no 'image' for the image; there is 'caption'.*`image:`"),
        ({}, {}, "no 'image' for the image; there is nothing"),
        ({"image": None, "caption": "x"}, {}, "no image in 'image'"),
        ({"image": 7, "caption": "x"}, {}, "'image' holds int; right would be"),
        ({"image": b"", "caption": "x"}, {}, "'image' holds nothing"),
        ({"image": {"height": 4}, "caption": "x"}, {}, "'image' holds nothing"),
        ({"image": "data:image/png;base64,a", "caption": "x"}, {}, "no valid base64"),
        ({"image": "data:,é", "caption": "x"}, {}, "no valid base64"),
        ({"image": "?" * 2000, "caption": "x"}, {}, "no valid base64"),
        ({"image": "a", "caption": 7}, {}, "'caption' holds int"),
        ({"image": "a", "caption": ["x", 7]}, {}, "'caption' holds int"),
        ({"image": "a", "caption": {"en": "x"}}, {}, "'caption' holds dict"),
        ({"image": "a", "caption": f"{IMAGE} x"}, {}, "in an answer"),
        ({"image": "a", "caption": "half \ud83d"}, {}, "half a character at place 5"),
        ({"image": "\udc00.png", "caption": "x"}, {}, "half a character at place 0"),
        ({"image": "a", "caption": ["x", "\ud83d"]}, {}, "half a character"),
        ({"q": "?"}, ASKED, "no 'a' for the answer; there is 'q'"),
        ({"image": ["a", "b"], "q": f"{IMAGE}?", "a": "x"}, ASKED, "1 times <image> in the text for 2 images"),
        ({"q": f"{IMAGE}?", "a": "x"}, ASKED, "1 times <image> in the text for 0 images"),
        ({"image": "a", "q": "?", "a": IMAGE}, ASKED, "in an answer"),
        ({"c": "Hi"}, CHAT, "no list of turns"),
        ({"c": ["Hi"]}, CHAT, "no list of turns"),
        ({"c": [{"from": "alien", "value": "Hi"}]}, CHAT, "turn 1 is from 'alien'; right would be one of human"),
        ({"c": [{"from": ["human"], "value": "Hi"}]}, CHAT, r"turn 1 is from \['human'\]"),
        ({"c": [{"value": "Hi"}]}, CHAT, "turn 1 is from None"),
        ({"c": [{"from": "human"}]}, CHAT, "turn 1 holds NoneType"),
        ({"c": [{"role": "user", "content": [{"type": "audio"}]}]}, CHAT, "turn 1 has a part of type 'audio'"),
        ({"c": [{"role": "user", "content": ["Hi"]}]}, CHAT, "turn 1 has a part of type None"),
        ({"c": [{"role": "user", "content": [{"type": "image"}]}, *said("", "x")[1:]]}, CHAT, "1 times .* 0 images"),
        ({"c": said("", "Hi")[1:]}, CHAT, "turns of assistant; right would be user and assistant in turn"),
        ({"c": [*said("Hi", "Hello"), *said("", "again")[1:]]}, CHAT, "turns of user, assistant, assistant"),
        ({"image": "a", "c": said("Hi", "Hello")}, CHAT, "0 times <image> in the text for 1 images"),
        ({"image": "a", "c": said(IMAGE * 2, "x")}, CHAT, "2 times <image> in the text for 1 images"),
        ({"image": ["a", "b"], "c": said(f"{IMAGE} Hi", f"Look: {IMAGE}")}, CHAT, "<image> in an answer"),
        ({"c": [*said("Hi")[:1], {"role": "assistant", "content": [{"type": "image", "image": "a"}]}]}, CHAT,
         "<image> in an answer"),
        ({"c": said("Hi", "", "Again?", "Hello")}, CHAT, "turn 2 is an empty answer"),
        ({"d": f"a {IMAGE}"}, {"document": "d"}, "1 times <image> in the text for 0 images"),
        ({"d": ["a", 7]}, {"document": "d"}, "other parts than texts and null"),
        ({"d": 7}, {"document": "d"}, "'d' holds int"),
        ({"t": f"{IMAGE} x"}, {"text": "t"}, "in an answer"),
    ],
)  # fmt: skip
def test_wrong_rows(record: dict[str, Any], keys: dict[str, str], message: str):
    with pytest.raises(DataError, match=message) as caught:
        parse(record, source(**keys))
    assert not isinstance(caught.value, Dropped)


@pytest.mark.parametrize(
    ("record", "keys", "rule"),
    [
        ({"image": "a", "caption": None}, {}, "no caption"),
        ({"image": "a", "caption": " \n"}, {}, "no caption"),
        ({"image": "a", "caption": []}, {}, "no caption"),
        ({"q": "?", "a": []}, ASKED, "no answer"),
        ({"q": "", "a": "x"}, ASKED, "no question"),
        ({"c": []}, CHAT, "no answer"),
        ({"c": said("Hi")}, CHAT, "no answer"),
        ({"c": said("Hi", " ")}, CHAT, "no answer"),
        ({"image": "a", "d": IMAGE}, {"document": "d"}, "no text"),
        ({"d": []}, {"document": "d"}, "no text"),
        ({"t": None}, {"text": "t"}, "no text"),
    ],
)
def test_rows_that_a_rule_leaves_out(record: dict[str, Any], keys: dict[str, str], rule: str):
    with pytest.raises(Dropped, match=rule):
        parse(record, source(**keys))


KEYS = ["from", "value", "role", "content", "type", "text", "image", "url", "bytes", "path", "answer"]
anything = st.recursive(
    st.none() | st.integers() | st.booleans() | st.floats() | st.binary(max_size=8) | st.text(max_size=8)
    | st.sampled_from([IMAGE, f"{IMAGE} a", "human", "gpt", "user", "data:image/png;base64,aaaa", ENCODED]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
LAYOUTS: list[dict[str, str]] = [{}, ASKED, CHAT, {"document": "d"}, {"text": "t"}]


@settings(deadline=None, max_examples=150)
@given(st.fixed_dictionaries(dict.fromkeys(["image", "caption", "q", "a", "c", "d", "t"], anything)),
       st.sampled_from(LAYOUTS))  # fmt: skip
def test_whatever_a_record_holds_is_a_sample_or_an_error(record: dict[str, Any], keys: dict[str, str]):
    try:
        text, images, references = parse(record, source(**keys))
    except DataError:
        return
    assert count_images(text) == len(images)
    assert references
    for words in references:
        assert words.encode().strip()
    assert all(isinstance(image, bytes | str) and image for image in images)


# --- what a recipe says -------------------------------------------------------------------------


def test_a_layout_is_what_is_named():
    assert [layout_of(source(**keys)) for keys in LAYOUTS] == [
        "caption", "question", "conversation", "document", "text",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"question": "q"}, "belong together"),
        ({"answer": "a"}, "belong together"),
        ({"caption": "c", "text": "t"}, "caption and text"),
        ({"conversation": "c", "document": "d"}, "conversation and document"),
        ({"annotations": "a.json"}, "format: vqa"),
        ({"streaming": True}, "of the hub"),
        ({"limit": 0}, "limit"),
        ({"weight": 0}, "weight"),
        ({"weight": -1}, "weight"),
        ({"weight": float("inf")}, "weight"),
        ({"weight": float("nan")}, "weight"),
        ({"format": "lava"}, "format"),
        ({"captoin": "c"}, "captoin"),
    ],
)
def test_a_source_that_makes_no_sense(keys: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        source(**keys)
