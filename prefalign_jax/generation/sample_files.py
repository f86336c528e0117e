"""Sampled responses and where they came from, in our files and in other tools' formats."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from prefalign_jax.data.conversation import is_answer
from prefalign_jax.data.messages import ROLES, Text
from prefalign_jax.data.records import TOLD, read_told, told
from prefalign_jax.data.rows import json_rows
from prefalign_jax.data.values import Malformed
from prefalign_jax.data.words import content
from prefalign_jax.files import read_json, whole
from prefalign_jax.types import Place, UserError


class Sample(NamedTuple):
    """One response of one model to one prompt.

    Attributes:
      prompt: plain text, or messages.
      response: the text that was sampled, or the messages of a conversation that went on after the prompt.
      model: its name.
      id: of the prompt, the same for every model; several samples may share it. Empty, the prompt stands for itself.
      seed: of the draw, None where it is not known.
      settings: of the sampling, such as temperature; JSON values.
      tools, chat_template_kwargs: what the chat template was told with the prompt, as in `records.Prompt`.
    """

    prompt: Text
    response: Text
    model: str
    id: str = ""
    seed: int | None = None
    settings: Mapping[str, Any] = {}
    tools: tuple[dict[str, Any], ...] = ()
    chat_template_kwargs: tuple[tuple[str, Any], ...] = ()


def as_row(record: Any) -> dict[str, Any]:
    """A sample, or another record with a prompt, as a row: what the template was told only where there is something.

    Example:
      >>> as_row(Sample("Hi", "Hello", "mine", chat_template_kwargs=(("mood", "calm"),)))["chat_template_kwargs"]
      {'mood': 'calm'}
    """
    return {name: value for name, value in record._asdict().items() if name not in TOLD} | told(record)


def as_text(prompt: Text) -> str:
    """A prompt as a person or a judge reads it: strings as they are, messages one after the other under their roles.

    Example:
      >>> print(as_text([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]))
      [user]
      Hi
      <BLANKLINE>
      [assistant]
      Hello
    """
    if isinstance(prompt, str):
        return prompt
    if [message["role"] for message in prompt] == ["user"]:
        return prompt[0]["content"]
    return "\n\n".join(f"[{message['role']}]\n{content([message])}" for message in prompt)


def answer_text(response: Text) -> str:
    """A response as a person or a judge reads it: a text, that of its one message, or messages under their roles.

    Example:
      >>> answer_text([{"role": "assistant", "content": "Hello"}])
      'Hello'
    """
    return content(response) if isinstance(response, str) or len(response) == 1 else as_text(response)


# Our own files.


def read_samples(path: str | Path) -> list[Sample]:
    """Reads a JSONL file with prompt, response and model in each row, and more of `Sample` as it has it.

    Raises:
      UserError: the file cannot be read or a row is malformed; the line names file and row.
    """
    out = []
    for where, row in json_rows(Path(path)):
        _object(where, row)
        settings, prompt = _field(where, row, "settings", Mapping, {}), text_of(where, row, "prompt")
        out.append(
            Sample(
                prompt,
                response_of(where, row, "response", prompt),
                _field(where, row, "model", str),
                _field(where, row, "id", str, ""),
                _field(where, row, "seed", int, None),
                settings,
                **told_with(where, row, prompt),
            )
        )
    return _some(path, out)


def told_with(where: Place, row: Mapping, prompt: Text) -> dict[str, tuple]:
    """What the template was told with the prompt of a row, see `records.read_told`.

    Raises:
      UserError: it is malformed.
    """
    try:
        return read_told(row, prompt)
    except Malformed as error:
        raise UserError(f"{where}: {error}") from None


# AlpacaEval's outputs: a JSON list.


def write_alpaca_eval(path: str | Path, samples: Iterable[Sample], dataset: str = "alpaca_eval") -> None:
    """Writes outputs as `alpaca_eval --model_outputs` reads them: [{instruction, output, generator, dataset}, ...].

    Args:
      path: of the .json file.
      samples: of prompts that are a string or a single user message.
      dataset: the name in every row.

    Raises:
      UserError: a prompt is a longer conversation.

    Source: github.com/tatsu-lab/alpaca_eval, example/outputs.json.
    """
    rows = []
    for number, sample in enumerate(samples, 1):
        if not isinstance(sample.prompt, str) and [m["role"] for m in sample.prompt] != ["user"]:
            raise UserError(f"{path}, row {number}: AlpacaEval's format holds one user message, not a conversation")
        texts = {"instruction": as_text(sample.prompt), "output": answer_text(sample.response)}
        rows.append({**texts, "generator": sample.model, "dataset": dataset})
    _write(path, [json.dumps(rows, indent=2, ensure_ascii=False), "\n"])


def read_alpaca_eval(path: str | Path) -> list[Sample]:
    """Reads AlpacaEval outputs; the instruction is a prompt of plain text, the data set's name a setting.

    Raises:
      UserError: the file cannot be read or a row is malformed.
    """
    rows = read_json(Path(path))
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a JSON list of outputs, found {type(rows).__name__}")
    out = []
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        _object(where, row)
        dataset = _field(where, row, "dataset", str, "")
        texts = [_field(where, row, name, str) for name in ("instruction", "output", "generator")]
        out.append(Sample(*texts, settings={"dataset": dataset} if dataset else {}))
    return _some(path, out)


# MT-Bench's answers: JSONL, the questions in a file of their own.


def read_mt_bench(answers: str | Path, questions: str | Path) -> list[Sample]:
    """Reads MT-Bench answers, a sample for each turn of each choice, its prompt the conversation up to there.

    The id is 'QUESTION/TURN', turns counted from 1. A second turn's prompt holds the model's own first answer.

    Args:
      answers: JSONL of question_id, answer_id, model_id, choices [{index, turns}], tstamp.
      questions: JSONL of question_id, category, turns.

    Raises:
      UserError: a file cannot be read, a row is malformed, or a question is missing.

    Source: github.com/lm-sys/FastChat, fastchat/llm_judge.
    """
    asked = {}
    for where, row in json_rows(Path(questions)):
        _object(where, row)
        asked[_field(where, row, "question_id", (int, str))] = _strings(where, row, "turns")
    out = []
    for where, row in json_rows(Path(answers)):
        _object(where, row)
        number, model = _field(where, row, "question_id", (int, str)), _field(where, row, "model_id", str)
        if number not in asked:
            raise UserError(f"{where}: question {number!r} is not in {questions}")
        for choice in _field(where, row, "choices", list):
            _object(f"{where}: field 'choices'", choice)
            turns = _strings(where, choice, "turns")
            if len(turns) > len(asked[number]):
                raise UserError(f"{where}: {len(turns)} turns, and question {number!r} has {len(asked[number])}")
            prompt = []
            for turn, (question, answer) in enumerate(zip(asked[number], turns, strict=False), 1):
                prompt = [*prompt, {"role": "user", "content": question}]
                out.append(Sample(prompt, answer, model, f"{number}/{turn}"))
                prompt = [*prompt, {"role": "assistant", "content": answer}]
    return _some(answers, out)


def whole_conversations(samples: Iterable[Sample]) -> list[Sample]:
    """MT-Bench's turns as one sample a conversation, as a judge compares them: all questions, and all answers.

    Two models' second turns answer different conversations, since each holds that model's own first answer; their
    questions are the same.

    Args:
      samples: as `read_mt_bench` gives them.

    Returns:
      The conversations in the same order, their ids those of the questions.
    """
    conversations: list[tuple[str, list[str], list[str], str]] = []
    for sample in samples:
        number, _, turn = sample.id.rpartition("/")
        if turn == "1":
            conversations.append((number, [], [], sample.model))
        conversations[-1][1].append(sample.prompt[-1]["content"])
        conversations[-1][2].append(sample.response)

    def joined(what: str, texts: list[str]) -> str:
        return texts[0] if len(texts) == 1 else "\n\n".join(f"[{what} {n}]\n{text}" for n, text in enumerate(texts, 1))

    return [
        Sample(joined("question", asked), joined("answer", answers), model, number)
        for number, asked, answers, model in conversations
    ]


# What the readers share.


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a line of JSON for each row; the file appears whole or not at all."""
    _write(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write(path: str | Path, parts: Iterable[str]) -> None:
    with whole(Path(path)) as part, part.open("w", encoding="utf-8") as file:
        file.writelines(parts)


def _object(where: Place | str, row: Any) -> None:
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: expected an object, found {type(row).__name__}")


_WORDS = {str: "a string", int: "an integer", list: "a list", Mapping: "an object", (int, str): "a number or a string"}
_NEEDED = object()


def _field(where: Place | str, row: Mapping[str, Any], name: str, kind: Any, default: Any = _NEEDED) -> Any:
    value = row.get(name)
    if value is None and default is not _NEEDED:
        return default
    if not isinstance(value, kind) or isinstance(value, bool):
        shown = "nothing" if value is None else f"{type(value).__name__} {value!r:.40}"
        raise UserError(f"{where}: field {name!r}: expected {_WORDS[kind]}, found {shown}")
    return value


def _strings(where: Place | str, row: Mapping[str, Any], name: str) -> list[str]:
    values = _field(where, row, name, list)
    for i, value in enumerate(values):
        _field(where, {f"{name}[{i}]": value}, f"{name}[{i}]", str)
    return values


def text_of(where: Place | str, row: Mapping[str, Any], name: str) -> Text:
    """A field that holds a string or a list of messages, checked; `where` is for the error."""
    value = row.get(name)
    if isinstance(value, str):
        return value
    for i, message in enumerate(_field(where, row, name, list)):
        place = f"{where}: field '{name}[{i}]'"
        _object(place, message)
        if _field(place, message, "role", str) not in ROLES:
            raise UserError(f"{place}: role: expected one of {', '.join(ROLES)}, found {message['role']!r}")
        _field(place, message, "content", str)
    return value


def response_of(where: Place | str, row: Mapping[str, Any], name: str, prompt: Text) -> Text:
    """A field that holds a response to a prompt: a string, or messages that begin with one of the assistant."""
    if not isinstance(row.get(name), list):
        return _field(where, row, name, str)
    value = text_of(where, row, name)
    if isinstance(prompt, str):
        raise UserError(f"{where}: field {name!r}: messages answer messages; write the prompt as messages too")
    if not value or not is_answer(value[0]):
        raise UserError(f"{where}: field {name!r}: expected a message of the assistant first")
    return value


def _some(path: str | Path, rows: list) -> list:
    if not rows:
        raise UserError(f"{path}: there is no sample")
    return rows
