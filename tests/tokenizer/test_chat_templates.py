"""What chat templates do with tools, and with messages that the format has no place for."""

from __future__ import annotations

from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from dist_convert.formats.tokenizer.chat import CHAT_TEMPLATES

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def render(model_type: str, messages: list[dict[str, Any]], tools: Any = None) -> str:
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"x": 0})), bos_token="<s>")
    text: str = tokenizer.apply_chat_template(
        messages, tools=tools, chat_template=CHAT_TEMPLATES[model_type], tokenize=False
    )
    return text


@pytest.mark.parametrize("messages", [[SYSTEM, ASSISTANT, USER], [SYSTEM, SYSTEM, USER], [USER, ASSISTANT, USER]])
def test_functions_go_into_the_first_message_of_the_user(messages: list[dict[str, Any]]) -> None:
    parts = render("llama3.1", messages, TOOLS).split("<|start_header_id|>")
    with_functions = [part for part in parts if "Given the following functions" in part]
    assert len(with_functions) == 1
    assert with_functions[0].startswith("user<|end_header_id|>")
    assert with_functions[0].endswith("\n\nHi<|eot_id|>")


@pytest.mark.parametrize(
    ("model_type", "messages", "tools", "words"),
    [
        ("llama3.1", [SYSTEM], TOOLS, "the functions go into the first message of the user, and there is none"),
        ("llama3", [USER, CALL], None, "Llama 3 has no format for calls of functions"),
        ("mistral", [ASSISTANT, USER], None, "user and assistant must take turns"),
        ("mistral v3", [ASSISTANT, USER], None, "user and assistant must take turns"),
    ],
)
def test_what_has_no_place_is_an_error(model_type: str, messages: list[dict[str, Any]], tools: Any, words: str) -> None:
    with pytest.raises(TemplateError, match=words):
        render(model_type, messages, tools)


def test_a_call_of_a_function_is_written_out_by_llama_3_1() -> None:
    text = render("llama3.1", [USER, CALL])
    assert text.endswith('assistant<|end_header_id|>\n\n{"name": "f", "parameters": {"x": 1}}<|eot_id|>')


@pytest.mark.parametrize(
    ("model_type", "expected"), [("mistral", "<s>[INST] Hi [/INST]"), ("mistral v3", "<s>[INST]Hi[/INST]")]
)
def test_an_empty_system_message_adds_nothing(model_type: str, expected: str) -> None:
    assert render(model_type, [{"role": "system", "content": ""}, USER]) == expected
