"""Chat templates in Jinja, for instruct models whose tokenizer is built from a bare file.

They render the formats that the models' makers document: Llama 2 in meta-llama/llama `llama/generation.py`, Llama 3 and
3.1 in meta-llama/llama-models `models/llama3/prompt_format.md` and `models/llama3_1/prompt_format.md`, Mistral and
Mixtral in mistralai/mistral-common `InstructTokenizerV1`, `V2`, `V3` and `V7`. A reader hands them `messages`,
`bos_token`, `eos_token`, `add_generation_prompt`, `tools` and `raise_exception`. No macros: not every reader's Jinja
has them.
"""

from textwrap import dedent


def _template(text: str, **parts: str) -> str:
    """The text with each @name@ replaced by a part."""
    text = dedent(text).strip()
    for name, part in parts.items():
        text = text.replace(f"@{name}@", dedent(part).strip())
    return text


_SYSTEM = """
    {%- set system = messages[0].content if messages and messages[0].role == 'system' else none %}
    {%- set turns = messages if system is none else messages[1:] %}
"""

_ALTERNATE = """
    {%- if message.role != ('user' if loop.index0 % 2 == 0 else 'assistant') %}
    {{- raise_exception('after an optional system message, user and assistant must take turns, the user first') }}
    {%- endif %}
"""

_LLAMA2 = """
    @system@
    {%- for message in turns %}
    @alternate@
    {%- if message.role == 'assistant' %}
    {{- ' ' ~ message.content | trim ~ ' ' ~ eos_token }}
    {%- elif loop.first and system is not none %}
    {{- bos_token ~ '[INST] ' ~ ('<<SYS>>\\n' ~ system ~ '\\n<</SYS>>\\n\\n' ~ message.content) | trim ~ ' [/INST]' }}
    {%- else %}
    {{- bos_token ~ '[INST] ' ~ message.content | trim ~ ' [/INST]' }}
    {%- endif %}
    {%- endfor %}
"""

# The tokenizer puts a space after each special token, so there is none after <s> and </s> here.
_MISTRAL = """
    @system@
    {{- bos_token }}
    {%- for message in turns %}
    @alternate@
    {%- if message.role == 'assistant' %}
    {{- ' ' ~ message.content ~ eos_token }}
    {%- elif loop.first and system %}
    {{- '[INST] ' ~ system ~ '\\n\\n' ~ message.content ~ ' [/INST]' }}
    {%- else %}
    {{- '[INST] ' ~ message.content ~ ' [/INST]' }}
    {%- endif %}
    {%- endfor %}
"""

# From the second version on, [INST] and its like are tokens, which the tokenizer puts a space after by itself; the
# system's text goes into the last user message.
_MISTRAL_V3 = """
    @system@
    {%- set last = turns | selectattr('role', 'equalto', 'user') | list | length * 2 - 2 %}
    {{- bos_token }}
    {%- for message in turns %}
    @alternate@
    {%- if message.role == 'assistant' %}
    {{- message.content.rstrip(' ') ~ eos_token }}
    {%- elif loop.index0 == last and system %}
    {{- '[INST]' ~ system ~ '\\n\\n' ~ message.content ~ '[/INST]' }}
    {%- else %}
    {{- '[INST]' ~ message.content ~ '[/INST]' }}
    {%- endif %}
    {%- endfor %}
"""

_MISTRAL_V7 = """
    @system@
    {{- bos_token }}
    {{- '[SYSTEM_PROMPT]' ~ system ~ '[/SYSTEM_PROMPT]' if system is not none else '' }}
    {%- for message in turns %}
    @alternate@
    {%- if message.role == 'assistant' %}
    {{- message.content.rstrip(' ') ~ eos_token }}
    {%- else %}
    {{- '[INST]' ~ message.content ~ '[/INST]' }}
    {%- endif %}
    {%- endfor %}
"""

_PROMPT = """
    {%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
    {%- endif %}
"""

_LLAMA3 = """
    {{- bos_token }}
    {%- for message in messages %}
    {%- if message.tool_calls or message.content is none %}
    {{- raise_exception('Llama 3 has no format for calls of functions') }}
    {%- endif %}
    {{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' ~ message.content | trim ~ '<|eot_id|>' }}
    {%- endfor %}
    @prompt@
"""

_LLAMA3_1 = """
    @system@
    {%- set functions = tools if tools else [] %}
    {%- set users = turns | selectattr('role', 'equalto', 'user') | list %}
    {%- if functions and not users %}
    {{- raise_exception('the functions go into the first message of the user, and there is none') }}
    {%- endif %}
    {%- set first = namespace(is_due=true) %}
    {{- bos_token ~ '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
    {{- 'Environment: ipython\\n' if functions else '' }}
    {{- 'Cutting Knowledge Date: December 2023\\nToday Date: ' }}
    {{- (date_string if date_string is defined else '26 Jul 2024') ~ '\\n\\n' }}
    {{- (system | trim if system is not none else '') ~ '<|eot_id|>' }}
    {%- for message in turns %}
    {%- if message.tool_calls %}
    {%- if message.tool_calls | length != 1 %}
    {{- raise_exception('Llama 3.1 calls one function at a time') }}
    {%- endif %}
    {%- set call = message.tool_calls[0].function %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' ~ call.name ~ '", "parameters": ' }}
    {{- (call.arguments if call.arguments is string else call.arguments | tojson) ~ '}<|eot_id|>' }}
    {%- elif message.role in ('tool', 'ipython') %}
    {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' ~ message.content | tojson ~ '<|eot_id|>' }}
    {%- else %}
    {{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' }}
    {%- if functions and first.is_due and message.role == 'user' %}
    {%- set first.is_due = false %}
    {{- 'Given the following functions, please respond with a JSON for a function call with its proper arguments ' }}
    {{- 'that best answers the given prompt.\\n\\nRespond in the format {"name": function name, "parameters": ' }}
    {{- 'dictionary of argument name and its value}.Do not use variables.\\n\\n' }}
    {%- for function in functions %}
    {{- function | tojson(indent=4) ~ '\\n\\n' }}
    {%- endfor %}
    {%- endif %}
    {{- message.content | trim ~ '<|eot_id|>' }}
    {%- endif %}
    {%- endfor %}
    @prompt@
"""

_OF_MISTRAL = _template(_MISTRAL, system=_SYSTEM, alternate=_ALTERNATE)

#: The template of each `Style.model_type`.
CHAT_TEMPLATES = {
    "llama2": _template(_LLAMA2, system=_SYSTEM, alternate=_ALTERNATE),
    "llama3": _template(_LLAMA3, prompt=_PROMPT),
    "llama3.1": _template(_LLAMA3_1, system=_SYSTEM, prompt=_PROMPT),
    "mistral": _OF_MISTRAL,
    "mixtral": _OF_MISTRAL,
    "mistral v3": _template(_MISTRAL_V3, system=_SYSTEM, alternate=_ALTERNATE),
    "mistral v7": _template(_MISTRAL_V7, system=_SYSTEM, alternate=_ALTERNATE),
}
