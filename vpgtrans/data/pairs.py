"""Published sets whose images, questions and answers lie in JSON files of their own: COCO captions, VQAv2, GQA.

Each is joined to one record an image or question: `id`, `image` (a path below the images' folder), and `caption`, or
`question` and `answer`.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vpgtrans.data.rows import ListRows, Rows
from vpgtrans.errors import DataError

Records = Iterator[dict[str, Any]]


def open_coco(file: Path) -> Rows:
    """COCO's captions_*.json: one record an image, with all its captions in the order of their ids."""

    def join(content: Any) -> Records:
        captions: dict[Any, list[str]] = {}
        for annotation in sorted(content["annotations"], key=lambda entry: entry["id"]):
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
        for image in content["images"]:
            # an image without captions is a row without a caption
            yield {
                "id": f"coco/{image['id']}",
                "image": image["file_name"],
                "caption": captions.pop(image["id"], []),
            }
        if captions:
            name = next(iter(captions))
            raise DataError(f"{file}: captions of images that it does not list, such as image_id {name}")

    return _joined(join, file, right="images with id and file_name, annotations with image_id and caption")


def open_vqa(questions: Path, annotations: Path, *, pattern: str) -> Rows:
    """VQAv2's and OK-VQA's questions and annotations; the most frequent answer comes first.

    pattern: file name of an image from its `image_id`, such as `COCO_train2014_{image_id:012d}.jpg`.
    """

    def join(content: Any) -> Records:
        answers = {entry["question_id"]: entry for entry in _load(annotations)["annotations"]}
        for entry in content["questions"]:
            found = answers.pop(entry["question_id"], None)
            if found is None:
                raise DataError(f"{annotations}: no answer to question_id {entry['question_id']} of {questions}")
            given = [answer["answer"] for answer in found.get("answers", [])]
            best = found.get("multiple_choice_answer") or (max(given, key=given.count) if given else None)
            yield {
                "id": f"vqa/{entry['question_id']}",
                "image": pattern.format(image_id=entry["image_id"]),
                "question": entry["question"],
                "answer": list(dict.fromkeys([best, *given])) if best else [],
            }
        if answers:
            raise DataError(f"{annotations}: answers to questions that {questions} does not ask, such as "
                            f"question_id {next(iter(answers))}")  # fmt: skip

    return _joined(join, questions, annotations, right="questions with question_id, image_id and question")


def open_gqa(file: Path) -> Rows:
    """GQA's *_questions.json: {question id: {imageId, question, answer}}."""

    def join(content: Any) -> Records:
        for name, entry in content.items():
            yield {
                "id": f"gqa/{name}",
                "image": f"{entry['imageId']}.jpg",
                "question": entry["question"],
                "answer": entry["answer"],
            }

    return _joined(join, file, right="{id: {imageId, question, answer}}")


def _joined(join: Callable[[Any], Records], *files: Path, right: str) -> Rows:
    content = _load(files[0])
    try:
        return ListRows(list(join(content)), str(files[0]), files)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f"{files[0]}: not laid out as expected ({type(error).__name__}: {error}); right would be {right}"
        ) from error


def _load(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: no valid JSON ({error})") from error
