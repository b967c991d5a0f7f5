"""Chat templates of our own, each with the structure of a well-known family's.

They differ in what matters to a loss mask: where system turns and tools go, how calls and results
are written, what becomes of earlier reasoning, what the generation prompt supplies, how turns and
conversations end. Names are those of the families; the texts are ours.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A template, the special tokens that it writes, and how it ends an answer."""

    source: str
    special: tuple[str, ...]
    end: str
    opening: str = ""
    """Text that the model, not the prompt, writes before an answer without reasoning."""
    system: bool = True
    tools: bool = True
    thinks: bool = False
    """Whether reasoning is written out."""
    texts: int = 1
    """Texts of a conversation of two turns without reasoning."""


def _source(text: str) -> str:
    # Written over several lines to be read; a newline in the output is spelled \n in a string.
    return "".join(line.strip() for line in text.splitlines())


_LLAMA = """
{{ bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{%- set system = '' %}
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content | trim %}{% set messages = messages[1:] %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + date_string + '\\n\\n' }}
{%- if tools %}{{ 'Functions:' }}{% for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}
{{- '\\n\\n' }}{% endif %}
{{- system + '<|eot_id|>' }}
{%- for message in messages %}
{%- if message.tool_calls is defined %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception('One call at a time') }}{% endif %}
{%- set call = message.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", ' }}
{{- '"parameters": ' + call.arguments | tojson + '}<|eot_id|>' }}
{%- elif message.role == 'tool' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + message.content | tojson + '<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
{{- message.content | trim + '<|eot_id|>' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""

_QWEN_HEAD = """
{%- if tools %}{{ '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
{{- '<tools>' }}{% for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}
{{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{% endif %}
"""
_QWEN_CALLS = """
{%- for call in message.tool_calls %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{%- set arguments = call.function.arguments %}
{{- (arguments if arguments is string else arguments | tojson) + '}\\n</tool_call>' }}{% endfor %}
"""
_QWEN_TOOL = """
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
"""
_QWEN25 = f"""{_QWEN_HEAD}
{{%- for message in messages %}}
{{%- if message.role == 'tool' %}}{_QWEN_TOOL}
{{%- elif message.role == 'assistant' %}}{{{{ '<|im_start|>assistant' }}}}
{{%- if message.content %}}{{{{ '\\n' + message.content }}}}{{% endif %}}
{{%- if message.tool_calls %}}{_QWEN_CALLS}{{% endif %}}{{{{ '<|im_end|>\\n' }}}}
{{%- elif not (message.role == 'system' and loop.first) %}}
{{{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}}}
{{%- endif %}}{{% endfor %}}
{{%- if add_generation_prompt %}}{{{{ '<|im_start|>assistant\\n' }}}}{{% endif %}}
"""
_QWEN3 = f"""{_QWEN_HEAD}
{{%- set ns = namespace(last=-1) %}}
{{%- for message in messages %}}{{% if message.role == 'user' %}}
{{%- set ns.last = loop.index0 %}}{{% endif %}}{{% endfor %}}
{{%- for message in messages %}}
{{%- if message.role == 'tool' %}}{_QWEN_TOOL}
{{%- elif message.role == 'assistant' %}}
{{%- set content = message.content if message.content is string else '' %}}
{{%- set thought = '' %}}
{{%- if message.reasoning_content is string %}}{{% set thought = message.reasoning_content %}}
{{%- elif '</think>' in content %}}
{{%- set thought = content.split('</think>')[0].split('<think>')[-1] %}}
{{%- set content = content.split('</think>')[-1].lstrip('\\n') %}}{{% endif %}}
{{{{- '<|im_start|>assistant\\n' }}}}
{{%- if loop.index0 > ns.last and (loop.last or thought) %}}
{{{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}}}{{% endif %}}
{{{{- content.lstrip('\\n') }}}}
{{%- if message.tool_calls %}}{_QWEN_CALLS}{{% endif %}}{{{{ '<|im_end|>\\n' }}}}
{{%- elif not (message.role == 'system' and loop.first) %}}
{{{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}}}
{{%- endif %}}{{% endfor %}}
{{%- if add_generation_prompt %}}{{{{ '<|im_start|>assistant\\n' }}}}
{{%- if enable_thinking is defined and enable_thinking is false %}}
{{{{- '<think>\\n\\n</think>\\n\\n' }}}}{{% endif %}}{{% endif %}}
"""

_GEMMA = """
{{ bos_token }}
{%- set first = '' %}
{%- if messages[0].role == 'system' %}
{%- set first = messages[0].content + '\\n\\n' %}{% set messages = messages[1:] %}{% endif %}
{%- for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
{{- (first if loop.first else '') + message.content | trim + '<end_of_turn>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""

_MISTRAL = """
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content %}{% set messages = messages[1:] %}{% endif %}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'user' %}
{%- if tools and message == users[-1] %}{{ '[AVAILABLE_TOOLS]' + tools | tojson }}
{{- '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST]' }}{% if loop.last and system is defined %}{{ system + '\\n\\n' }}{% endif %}
{{- message.content + '[/INST]' }}
{%- elif message.tool_calls is defined and message.tool_calls is not none %}{{ '[TOOL_CALLS][' }}
{%- for call in message.tool_calls %}
{{- '{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson + '}' }}
{{- '' if loop.last else ', ' }}{% endfor %}{{ ']' + eos_token }}
{%- elif message.role == 'assistant' %}{{ message.content + eos_token }}
{%- elif message.role == 'tool' %}{{ '[TOOL_RESULTS]' + message.content | tojson }}
{{- '[/TOOL_RESULTS]' }}
{%- else %}{{ raise_exception('Only user, assistant and tool roles are supported') }}
{%- endif %}{% endfor %}
"""

_PHI = """
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '<|im_sep|>' + message.content + '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}
"""

_R1 = """
{{ bos_token }}
{%- for message in messages %}{% if message.role == 'system' %}{{ message.content }}
{%- endif %}{% endfor %}
{%- for message in messages %}
{%- if message.role == 'user' %}{{ '<|User|>' + message.content }}
{%- elif message.role == 'assistant' %}
{%- set content = message.content %}
{%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
{{- '<|Assistant|>' + content + eos_token }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}
"""

_GPT_OSS = """
{{- '<|start|>system<|message|>Date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}
{%- if messages[0].role in ['system', 'developer'] %}
{%- set instructions = messages[0].content %}{% set messages = messages[1:] %}{% endif %}
{%- if instructions or tools %}
{{- '<|start|>developer<|message|>' + (instructions or '') }}
{%- for tool in tools or [] %}{{ '\\ntype ' + tool.function.name + ' = ' }}
{{- tool.function.parameters | tojson }}{% endfor %}{{ '<|end|>' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' and message.tool_calls %}
{%- set call = message.tool_calls[0].function %}
{%- if message.thinking %}{{ '<|start|>assistant<|channel|>analysis<|message|>' }}
{{- message.thinking + '<|end|>' }}{% endif %}
{{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}
{{- call.arguments | tojson + '<|call|>' }}
{%- elif message.role == 'assistant' %}
{%- if message.thinking and loop.last %}{{ '<|start|>assistant<|channel|>analysis<|message|>' }}
{{- message.thinking + '<|end|>' }}{% endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + message.content }}
{{- '<|return|>' if loop.last else '<|end|>' }}
{%- elif message.role == 'tool' %}
{{- '<|start|>functions to=assistant<|channel|>commentary<|message|>' }}
{{- message.content | tojson + '<|end|>' }}
{%- else %}{{ '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}
"""

_GLM = """
{{ '[gMASK]<sop>' }}
{%- if tools %}{{ '<|system|>\\n# Tools' }}{% for tool in tools %}{{ '\\n' + tool | tojson }}
{%- endfor %}{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}
{%- set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{%- set content = message.content or '' %}{% set thought = message.reasoning_content or '' %}
{%- if '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1] %}
{%- set content = content.split('</think>')[-1] %}{% endif %}
{{- '<|assistant|>\\n' }}
{%- if loop.index0 > ns.last and thought %}{{ '<think>' + thought.strip() + '</think>\\n' }}
{%- else %}{{ '<think></think>\\n' }}{% endif %}
{{- content.strip() }}
{%- for call in message.tool_calls or [] %}{{ '\\n<tool_call>' + call.function.name }}
{%- for key, value in call.function.arguments.items() %}
{{- '\\n<arg_key>' + key + '</arg_key>\\n<arg_value>' }}
{{- (value if value is string else value | tojson) + '</arg_value>' }}{% endfor %}
{{- '\\n</tool_call>' }}{% endfor %}
{%- elif message.role == 'tool' %}{{ '<|observation|>\\n<tool_response>\\n' + message.content }}
{{- '\\n</tool_response>' }}
{%- else %}{{ '<|' + message.role + '|>\\n' + message.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}
{{- '\\n<think></think>' if enable_thinking is defined and not enable_thinking else '' }}{% endif %}
"""

_GRANITE = """
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content %}{% set messages = messages[1:] %}
{%- else %}{% set system = 'Date: ' + strftime_now('%B %d, %Y') + '.' %}{% endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\\n' }}
{%- if tools %}{{ '<|start_of_role|>tools<|end_of_role|>' + tools | tojson(indent=4) }}
{{- '<|end_of_text|>\\n' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' and message.tool_calls %}
{{- '<|start_of_role|>assistant<|end_of_role|><|tool_call|>' }}
{{- message.tool_calls | map(attribute='function') | list | tojson + '<|end_of_text|>\\n' }}
{%- else %}{{ '<|start_of_role|>' + message.role + '<|end_of_role|>' + message.content }}
{{- '<|end_of_text|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}
"""

_IM = ("<|im_start|>", "<|im_end|>")
FAMILIES = {
    "llama-3.1": Family(
        _source(_LLAMA), ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"
    ),
    "qwen-2.5": Family(_source(_QWEN25), _IM, "<|im_end|>\n"),
    "qwen-3": Family(_source(_QWEN3), _IM, "<|im_end|>\n", thinks=True, texts=2),
    "gemma-3": Family(
        _source(_GEMMA), ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>\n", tools=False
    ),
    "mistral-3": Family(
        _source(_MISTRAL),
        ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]",
         "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        "</s>",
    ),
    "phi-4": Family(_source(_PHI), (*_IM, "<|im_sep|>"), "<|im_end|>", tools=False),
    "deepseek-r1-distill": Family(
        _source(_R1), ("<|User|>", "<|Assistant|>"), "</s>", tools=False, thinks=True
    ),
    "gpt-oss": Family(
        _source(_GPT_OSS),
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"),
        "<|return|>",
        opening="<|channel|>final<|message|>",
        thinks=True,
        texts=2,
    ),
    "glm-4": Family(
        _source(_GLM),
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        "",
        opening="\n",
        thinks=True,
    ),
    "granite": Family(
        _source(_GRANITE),
        ("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>", "<|end_of_text|>"),
        "<|end_of_text|>\n",
    ),
}  # fmt: skip
