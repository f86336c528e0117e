"""The templates again with `{% generation %}` around what a model generates: what it says and the end of its turn."""

from templates import JINJA

_BEGIN, _END = "{% generation %}", "{% endgeneration %}"


def _around(text):
    return _BEGIN + text + _END


# Family -> (what its template has, what stands in its place).
_CHANGES = {
    "chatml": [
        (
            "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}",
            "{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}"
            + _around("{{ message['content'] + '<|im_end|>' }}")
            + "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}",
        )
    ],
    "deepseek_v3": [
        (
            "'<｜Assistant｜>' + message['content'] + '<｜tool▁calls▁begin｜>' }}",
            "'<｜Assistant｜>' }}" + _BEGIN + "{{- message['content'] + '<｜tool▁calls▁begin｜>' }}",
        ),
        ("{{- '<｜tool▁calls▁end｜>' + eos_token }}", "{{- '<｜tool▁calls▁end｜>' + eos_token }}" + _END),
        (
            "'<｜tool▁outputs▁end｜>' + message['content'] + eos_token }}",
            "'<｜tool▁outputs▁end｜>' }}" + _around("{{- message['content'] + eos_token }}"),
        ),
        (
            "'<｜Assistant｜>' + message['content'] + eos_token }}",
            "'<｜Assistant｜>' }}" + _around("{{- message['content'] + eos_token }}"),
        ),
    ],
    "gemma3": [
        (
            "{{- message['content'] | trim }}\n    {{- '<end_of_turn>\\n' }}",
            "{%- if role == 'model' %}"
            + _around("{{- message['content'] | trim + '<end_of_turn>' }}")
            + "{%- else %}{{- message['content'] | trim + '<end_of_turn>' }}{%- endif %}{{- '\\n' }}",
        )
    ],
    "llama31": [
        ('\\n\\n{"name": "\' + call.name', "\\n\\n' }}" + _BEGIN + '{{- \'{"name": "\' + call.name'),
        ('{{- "}<|eot_id|>" }}', '{{- "}<|eot_id|>" }}' + _END),
        (
            "'<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}",
            "'<|end_header_id|>\\n\\n' }}{%- if message.role == 'assistant' %}"
            + _around("{{- message['content'] | trim + '<|eot_id|>' }}")
            + "{%- else %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endif %}",
        ),
    ],
    "mistral": [
        ('{{- "[TOOL_CALLS] [" }}', _BEGIN + '{{- "[TOOL_CALLS] [" }}'),
        ('"]" + eos_token }}\n        {%- endfor %}', '"]" + eos_token }}\n        {%- endfor %}' + _END),
        ('{{- " " + message["content"] + eos_token }}', _around('{{- " " + message["content"] + eos_token }}')),
    ],
    "phi3": [
        (
            "{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}",
            "{{'<|assistant|>\\n'}}" + _around("{{message['content'] + '<|end|>'}}") + "{{'\\n'}}",
        )
    ],
    "qwen25": [
        (
            "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}",
            "{{- '<|im_start|>' + message.role + '\\n' }}{%- if message.role == 'assistant' %}"
            + _around("{{- message.content + '<|im_end|>' }}")
            + "{%- else %}{{- message.content + '<|im_end|>' }}{%- endif %}{{- '\\n' }}",
        ),
        ("{{- '<|im_start|>' + message.role }}", "{{- '<|im_start|>' + message.role + '\\n' }}" + _BEGIN),
        ("{{- '\\n' + message.content }}", "{{- message.content + '\\n' }}"),
        (
            '{{- \'\\n<tool_call>\\n{"name": "\' }}',
            "{{- '' if loop.first else '\\n' }}{{- '<tool_call>\\n{\"name\": \"' }}",
        ),
        ("{{- '<|im_end|>\\n' }}\n    {%- elif", "{{- '<|im_end|>' }}" + _END + "{{- '\\n' }}\n    {%- elif"),
    ],
    "qwen3": [
        (
            "{%- if loop.index0 > ns.last_query and",
            "{{- '<|im_start|>' + message.role + '\\n' }}" + _BEGIN + "{%- if loop.index0 > ns.last_query and",
        ),
        ("'<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content", "'<think>\\n' + reasoning_content"),
        ("{{- '<|im_start|>' + message.role + '\\n' + content }}", "{{- content }}"),
        ("{{- '<|im_end|>\\n' }}\n    {%- elif", "{{- '<|im_end|>' }}" + _END + "{{- '\\n' }}\n    {%- elif"),
    ],
}


def _changed(family):
    jinja = JINJA[family]
    for old, new in _CHANGES[family]:
        assert jinja.count(old) == 1, (family, old)
        jinja = jinja.replace(old, new)
    return jinja


GENERATED = {family: _changed(family) for family in _CHANGES}
